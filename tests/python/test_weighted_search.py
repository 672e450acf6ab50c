"""The weighted scale search against its definition."""

import numpy as np
import pytest
import torch
from rounding import CODED, WIDTH, decoded, matrix, reference_scales, search_scales, weighted

import libqat
from libqat import _core


def weighted_error(w, scales, grid, importance):
    return ((w.astype(np.float64) - decoded(w, scales, grid)) ** 2 * importance).reshape(len(w), -1)


@pytest.mark.parametrize("grid", CODED)
def test_weighted_search_is_never_worse_than_the_rule_and_the_search(grid):
    w = matrix(rows=6)
    importance = np.exp(2 * np.random.default_rng(5).normal(size=WIDTH))
    found = libqat.grids()[grid]
    block = found.block or WIDTH
    rows = 1 if found.whole_tensor else 6

    def errors(scales):
        each = weighted_error(w, scales, grid, importance)
        return each.reshape(rows, -1, w.size // rows if found.whole_tensor else block).sum(2)

    best = errors(weighted(w, importance, grid))
    assert (best <= errors(reference_scales(w, grid))).all()
    if not found.whole_tensor:
        assert (best <= errors(search_scales(w, grid))).all()
    if found.bits <= 4:
        assert best.sum() < 0.95 * errors(reference_scales(w, grid)).sum()


@pytest.mark.parametrize("grid", ["q4_0", "int3_g32", "int2_channel"])
def test_weighted_search_comes_near_the_best_of_all_scales(grid):
    """For one scale a dense scan is the true optimum; the search may miss it by a little."""
    w = matrix(rows=4, width=32)
    importance = np.exp(2 * np.random.default_rng(5).normal(size=32))
    top = np.abs(w).max(1)
    dense = np.full(4, np.inf)
    for share in np.concatenate([np.linspace(0.02, 1.0, 4000), -np.linspace(0.02, 1.0, 4000)]):
        scales = (share * top).astype(np.float32)[:, None, None]
        dense = np.minimum(dense, weighted_error(w, scales, grid, importance).sum(1))
    found = weighted_error(w, weighted(w, importance, grid), grid, importance).sum(1)
    assert (found <= 1.1 * dense).all()  # the worst of these blocks is 1.0x


def test_weighted_search_of_equal_weights_is_no_worse_than_the_search():
    w = matrix()
    for grid in ("q4_0", "q4_1", "mlx3_g32", "q3_k"):
        ones = np.ones(WIDTH)
        found = weighted_error(w, weighted(w, ones, grid), grid, ones).sum()
        assert found <= weighted_error(w, search_scales(w, grid), grid, ones).sum()


def test_weighted_search_refuses():
    w, ones = torch.from_numpy(matrix()), torch.ones(WIDTH)
    with pytest.raises(libqat.ArgumentError, match=r"importance of float32 or float64\[256\]"):
        _core.weighted_search_tensor(w, ones[1:], "q4_0")
    with pytest.raises(libqat.ArgumentError, match="importance of at least 0"):
        _core.weighted_search_tensor(w, -ones, "q4_0")
    with pytest.raises(libqat.NumericError, match="weighted_search: up: expected a finite importance"):
        _core.weighted_search_tensor(w, ones * float("nan"), "q4_0", tensor="up")
    with pytest.raises(libqat.NumericError, match="weighted_search: up: row 0 is not finite"):
        _core.weighted_search_tensor(w * float("inf"), ones, "q4_0", tensor="up")


def test_zero_importance_everywhere_is_equal_importance():
    w = matrix()
    np.testing.assert_array_equal(weighted(w, np.zeros(WIDTH), "q4_0"), search_scales(w, "q4_0"))
