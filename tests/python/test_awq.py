"""AWQ: its search for scales, and folds that leave the float model as it was."""

import json

import numpy as np
import pytest
import torch
from conftest import logits, make_llama

import libqat
from libqat import _core


def numpy_awq(weights, h, magnitude, grid, steps=20):
    best = (np.inf, None, None)
    plain = None
    for step in range(steps + 1):
        s = np.maximum(magnitude ** (step / steps), 1e-4)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        error = 0.0
        for w in weights:
            scaled = w * s
            scales = _core.grid_choose(grid, scaled)
            codes = _core.grid_encode(grid, scaled, scales)
            difference = w - _core.grid_decode(grid, codes, _core.grid_store(grid, scales, w.shape[1])) / s
            error += np.trace(difference.astype(np.float64) @ h @ difference.T)
        plain = error if plain is None else plain
        if error < best[0]:
            best = (error, s, step / steps)
    return best[1], best[2], best[0] / plain


def test_awq_scale_is_the_grid_search():
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 64)) * np.exp(random.normal(size=64))
    h, magnitude = x.T @ x / len(x), np.abs(x).mean(0)
    weights = [(random.normal(size=(rows, 64)) * 0.1).astype(np.float32) for rows in (16, 8)]
    s, alpha, error = _core.awq_scale(
        [torch.from_numpy(w) for w in weights],
        ["int3_g32", "int3_g32"],
        torch.from_numpy(h),
        torch.from_numpy(magnitude),
        scale="reference",
    )
    expected, expected_alpha, expected_error = numpy_awq(weights, h, magnitude, "int3_g32")
    assert alpha == expected_alpha > 0
    assert error == pytest.approx(expected_error, rel=1e-4)  # float32 against float64 sums
    np.testing.assert_allclose(s.numpy(), expected, rtol=1e-6)
    assert error < 0.9


def test_inputs_of_one_producer_get_one_scale():
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.normal(size=(500, 64)) * np.exp(random.normal(size=64)))
    rows = (torch.arange(64) // 32 * 16 + torch.arange(64) % 16).tolist()  # two heads share each value head
    s, alpha, _ = _core.awq_scale(
        [torch.randn(16, 64)], ["int3_g32"], x.T @ x / 500, x.abs().mean(0), producer_rows=rows
    )
    assert alpha > 0
    for row in set(rows):
        assert len({float(s[i]) for i in range(64) if rows[i] == row}) == 1


def test_awq_refuses():
    w, h, m = torch.randn(4, 32), torch.eye(32), torch.ones(32)
    with pytest.raises(libqat.ArgumentError, match="steps of at least 1"):
        _core.awq_scale([w], ["q4_0"], h, m, steps=0)
    with pytest.raises(libqat.ArgumentError, match="rows of at least 0"):
        _core.awq_scale([w], ["q4_0"], h, m, rows=-1)
    with pytest.raises(libqat.ArgumentError, match="weights and as many grids"):
        _core.awq_scale([w], [], h, m)
    with pytest.raises(libqat.ArgumentError, match="a producer row for each of 32 inputs"):
        _core.awq_scale([w], ["q4_0"], h, m, producer_rows=[0])
    with pytest.raises(libqat.ArgumentError, match="expected a prepared Decoder"):
        libqat.awq(torch.nn.Linear(2, 2), m)


@pytest.mark.parametrize(
    ("tied", "changes"),
    [(True, {}), (False, {"attention_bias": True, "mlp_bias": True}), (True, {"num_key_value_heads": 4})],
    ids=["gqa", "biases-untied", "all-heads"],
)
def test_folding_leaves_the_float_model(tied, changes, windows, tmp_path):
    model = make_llama(tied, **changes)
    with torch.no_grad():  # norms and biases of a fresh model are ones and zeros: nothing could go wrong
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    decoder = libqat.load_model(tmp_path).decoder
    expected = logits(decoder, windows)
    before = {name: value.detach().clone() for name, value in decoder.parameters().items()}
    policy = {"rules": [{"match": ".*_proj", "weight": "int3_g32"}, {"match": ".*", "weight": "q8_0"}]}
    prepared = libqat.prepare(decoder, libqat.Policy.from_json(json.dumps(policy)).with_scale("learned"))
    folds = libqat.awq(prepared, windows, compute_dtype="float32")
    prepared.set_enabled(False)
    # float32: each weight is multiplied and divided once
    torch.testing.assert_close(logits(decoder, windows), expected, rtol=1e-4, atol=1e-5)
    assert len(folds) == 8 + (not tied)
    assert sum(fold.alpha > 0 for fold in folds) >= 4
    for fold in folds:
        assert 0 < fold.error <= 1
        moved = [not torch.equal(before[n], decoder.parameters()[n]) for n in fold.producers[:1]]
        assert all(moved) == (fold.alpha > 0) or fold.producers[0].endswith("_proj.weight")
    values = [fold for fold in folds if fold.producers[0].endswith("v_proj.weight")]
    assert values[0].weights == ["model.layers.0.self_attn.o_proj.weight"]
    assert len(values[0].producers) == (2 if "attention_bias" in changes else 1)


def test_awq_errs_less_than_plain_scales_and_gptq_may_follow(hf_folder, windows):
    policy = {"rules": [{"match": ".*_proj", "weight": "int3_g32"}]}
    policy = libqat.Policy.from_json(json.dumps(policy)).with_scale("learned")
    expected = logits(libqat.load_model(hf_folder).decoder, windows)

    def error(*methods):
        decoder = libqat.load_model(hf_folder).decoder
        prepared = libqat.prepare(decoder, policy)
        for method in methods:
            method(prepared, windows, compute_dtype="float32")
        return float((logits(decoder, windows) - expected).square().mean())

    with_awq = error(libqat.awq)
    assert with_awq < error(libqat.weighted_search)
    assert error(libqat.awq, libqat.gptq) < with_awq
