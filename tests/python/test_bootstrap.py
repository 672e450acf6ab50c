"""Bootstrap intervals against the same resampling written in numpy, and against closed formulas."""

import math

import numpy as np
import pytest
import torch

import libqat
from libqat import ArgumentError

RESAMPLES = 500


def draws(seed: int, items: int, resamples: int) -> np.ndarray:
    """Item numbers [resamples, items]: SplitMix64 by its definition, scaled in exact integers."""
    mask, state, result = (1 << 64) - 1, seed, []
    for _ in range(resamples * items):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        result.append(((z ^ (z >> 31)) * items) >> 64)
    return np.array(result).reshape(resamples, items)


def means_of(values, weights, chosen: np.ndarray) -> np.ndarray:
    values, weights = np.asarray(values), np.asarray(weights)
    return (values * weights)[chosen].sum(1) / weights[chosen].sum(1)


@pytest.fixture
def scores():
    """Three models on 7 windows of a text, the last one shorter."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(19, 19, generator=generator) * 2
    noise = [torch.randn(19, 19, generator=generator) * scale for scale in (3.0, 0.8)]
    tokens = torch.randint(19, (130,), generator=generator)
    models = [lambda t, extra=extra: (table + extra)[t] for extra in noise]
    return libqat.compare(lambda t: table[t], models, tokens, window=20)


@pytest.mark.parametrize("seed", [0, 7, 2**63])
def test_resampled_means_equal_numpy(seed):
    rng = np.random.default_rng(1)
    series, weights = rng.normal(size=(3, 11)), rng.uniform(1, 255, size=11)
    found = libqat.resampled_means(series.tolist(), weights.tolist(), resamples=RESAMPLES, seed=seed)
    chosen = draws(seed, 11, RESAMPLES)
    assert found.shape == (3, RESAMPLES)
    assert found.dtype == torch.float64
    for row, values in zip(found.numpy(), series, strict=True):
        # sums of 11 products in another order: some 2^-53 relative
        np.testing.assert_allclose(row, means_of(values, weights, chosen), rtol=1e-12, atol=1e-14)


def test_mean_interval_is_numpys_percentile():
    values = np.random.default_rng(2).exponential(size=40)
    expected = np.percentile(means_of(values, np.ones(40), draws(3, 40, RESAMPLES)), [2.5, 97.5])
    found = libqat.mean_interval(values.tolist(), resamples=RESAMPLES, seed=3)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_score_intervals_equal_numpy(scores):
    weights = np.array(scores[0].window_tokens)
    assert weights.tolist() == [19] * 6 + [9]
    chosen = draws(5, 7, RESAMPLES)
    found = libqat.score_intervals(scores, resamples=RESAMPLES, seed=5)
    for score, intervals in zip(scores, found, strict=True):
        for key in ("nll", "kl", "top1"):
            means = means_of(getattr(score, f"window_{key}"), weights, chosen)
            np.testing.assert_allclose(intervals[key], np.percentile(means, [2.5, 97.5]), rtol=1e-12)
        np.testing.assert_allclose(intervals["ppl"], np.exp(intervals["nll"]), rtol=1e-15)
    assert found[1]["kl"][0] < scores[1].kl < found[1]["kl"][1]


def test_shares_removed_equal_numpy(scores):
    float_, ptq, qat = scores
    chosen, weights = draws(9, 7, RESAMPLES), ptq.window_tokens
    found = libqat.removed(float_, ptq, qat, resamples=RESAMPLES, seed=9)
    kl = 1 - means_of(qat.window_kl, weights, chosen) / means_of(ptq.window_kl, weights, chosen)
    np.testing.assert_allclose(found["kl_interval"], np.percentile(kl, [2.5, 97.5]), rtol=1e-10)
    assert found["kl"] == 1 - qat.kl / ptq.kl

    def cost(score):
        return means_of(score.window_nll, weights, chosen) - means_of(float_.window_nll, weights, chosen)

    assert found["nll"] == 1 - (qat.nll - float_.nll) / (ptq.nll - float_.nll)
    assert (cost(ptq) > 0).all(), "else there is no interval"
    nll = 1 - cost(qat) / cost(ptq)
    # differences of losses lose some digits
    np.testing.assert_allclose(found["nll_interval"], np.percentile(nll, [2.5, 97.5]), rtol=1e-10)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """300 samples of 60 normal values: a 95 % interval misses the true mean in about 5 % of them."""
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(300):
        low, high = libqat.mean_interval(rng.normal(size=60).tolist(), resamples=400)
        missed += not low <= 0 <= high
    # Binomial(300, 0.05 to 0.065, the percentile method being a little narrow): 15 to 20, deviation 4.
    assert 4 <= missed <= 34


def test_nothing_is_concluded_from_one_item():
    assert all(map(math.isnan, libqat.mean_interval([1.0])))


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="items"):
        libqat.mean_interval([])
    with pytest.raises(ArgumentError, match="weights"):
        libqat.mean_interval([1.0, 2.0], [1.0])
    with pytest.raises(ArgumentError, match="resamples"):
        libqat.mean_interval([1.0, 2.0], resamples=0)
