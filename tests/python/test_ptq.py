"""GPTQ against a small numpy version of its formulas."""

import numpy as np
import pytest
import torch
from rounding import (
    CODED,
    WIDTH,
    decoded,
    inputs,
    matrix,
    reference_scales,
    search_scales,
    second_moments,
    weighted,
)

import libqat
from libqat import _core, ops


def gptq(w, h, grid, **options):
    """The method's latents and scales as arrays; the scales once per row."""
    latent, scales = _core.gptq_tensor(torch.from_numpy(w), torch.from_numpy(h), grid, **options)
    return latent.numpy(), np.ascontiguousarray(scales.expand(len(w), -1, -1).numpy())


def textbook(w, h, grid, damping=0.01, order=None, static=False, scales_of=reference_scales):
    """GPTQ column by column, all updates at once, in float64; returns (latents, decoded weights, scales)."""
    width = w.shape[1]
    order = np.arange(width) if order is None else order
    block = libqat.grids()[grid].block or width
    live = np.diag(h) > 0
    damped = h + np.diag(np.where(live, 0, np.diag(h)[live].mean()))
    damped = damped + damping * np.diag(h)[live].mean() * np.eye(width)
    factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    work, latent, shipped = w.astype(np.float64), w.copy(), np.zeros_like(w)
    scales = scales_of(w, grid)
    for position, column in enumerate(order):
        index = column // block
        here = slice(index * block, (index + 1) * block)
        if column % block == 0 and not static and block < width:
            scales[:, index] = scales_of(work[:, here].astype(np.float32), grid)[:, 0]
        latent[:, column] = work[:, column]
        values = decoded(np.ascontiguousarray(latent[:, here]), scales[:, index : index + 1].copy(), grid)
        shipped[:, column] = values[:, column - index * block]
        error = (work[:, column] - shipped[:, column]) / factor[position, position]
        later = order[position + 1 :]
        work[:, later] -= np.outer(error, factor[position, position + 1 :])
    return latent, shipped, scales


def layer_error(w, w_hat, h):
    difference = w.astype(np.float64) - w_hat
    return np.trace(difference @ h @ difference.T)


@pytest.mark.parametrize("grid", CODED)
def test_gptq_is_the_textbook_loop_and_its_solution_encodes_to_it(grid):
    """float64 on both sides; only a weight within 1e-9 of a border could part them, and none is."""
    w, h = matrix(), second_moments(inputs())
    latent, scales = gptq(w, h, grid, scale="reference")
    expected_latent, shipped, expected_scales = textbook(w, h, grid)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_allclose(latent, expected_latent, rtol=1e-6, atol=1e-9)  # float32 of equal float64
    np.testing.assert_array_equal(decoded(latent, scales, grid), shipped)


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "int2_g32", "int4_channel", "q3_k", "mlx4_g32"])
def test_gptq_errs_less_than_rounding(grid):
    w, h = matrix(), second_moments(inputs(spread=0.3))
    scales = {
        "reference": reference_scales(w, grid),
        "search": search_scales(w, grid),
        "weighted": weighted(w, np.diag(h).copy(), grid),
    }
    for scale, rule in scales.items():
        nearest = layer_error(w, decoded(w, rule, grid), h)
        latent, found = gptq(w, h, grid, scale=scale)
        assert layer_error(w, decoded(latent, found, grid), h) < 0.9 * nearest, scale


@pytest.mark.parametrize("grid", CODED)
def test_with_a_diagonal_hessian_gptq_is_rounding(grid):
    w = matrix(rows=3)
    h = np.diag(np.random.default_rng(3).uniform(0.1, 2.0, WIDTH))
    for options in ({}, {"act_order": True}, {"act_order": True, "static_scales": True}):
        latent, scales = gptq(w, h, grid, scale="reference", **options)
        np.testing.assert_array_equal(latent, w)
        np.testing.assert_array_equal(scales, reference_scales(w, grid))


@pytest.mark.parametrize("grid", ["q4_0", "int4_g128", "int3_channel", "q2_k", "nvfp4"])
def test_gptq_searches_the_compensated_weights(grid):
    w, h = matrix(), second_moments(inputs())
    latent, scales = gptq(w, h, grid, scale="search")
    _, shipped, expected = textbook(w, h, grid, scales_of=search_scales)
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(decoded(latent, scales, grid), shipped)


@pytest.mark.parametrize("grid", ["q4_0", "int4_g128", "int4_channel", "int8_tensor", "q4_k"])
def test_act_order_with_static_scales_sorts_columns(grid):
    w, h = matrix(), second_moments(inputs())
    order = np.argsort(-np.diag(h), kind="stable")
    latent, scales = gptq(w, h, grid, scale="reference", act_order=True, static_scales=True)
    np.testing.assert_array_equal(scales, reference_scales(w, grid))
    _, shipped, _ = textbook(w, h, grid, order=order, static=True)
    np.testing.assert_array_equal(decoded(latent, scales, grid), shipped)


@pytest.mark.parametrize(("grid", "block"), [("q4_0", 32), ("mlx2_g64", 64), ("int4_g128", 128)])
def test_act_order_keeps_blocks_together(grid, block):
    w, h = matrix(), second_moments(inputs())
    groups = np.argsort(-np.diag(h).reshape(-1, block).sum(1), kind="stable")
    order = (groups[:, None] * block + np.arange(block)).ravel()
    assert (order != np.arange(WIDTH)).any()
    latent, scales = gptq(w, h, grid, scale="reference", act_order=True)
    _, shipped, expected = textbook(w, h, grid, order=order)
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(decoded(latent, scales, grid), shipped)


@pytest.mark.parametrize("block", [1, 32, 100, 4096])
def test_the_lazy_blocks_change_nothing_but_speed(block):
    w, h = matrix(), second_moments(inputs())
    latent, scales = gptq(w, h, "q4_0", block=block)
    expected, expected_scales = gptq(w, h, "q4_0")
    np.testing.assert_array_equal(scales, expected_scales)
    # sums of float64 in another order
    np.testing.assert_allclose(latent, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("grid", ["q4_0", "int4_channel", "q4_k", "int8_tensor"])
def test_the_number_of_threads_changes_no_bit(grid):
    w, h = matrix(rows=21), second_moments(inputs())
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gptq(w, h, grid))
    for latent, scales in found[1:]:
        np.testing.assert_array_equal(latent, found[0][0])
        np.testing.assert_array_equal(scales, found[0][1])


def test_rows_do_not_see_each_other():
    w, h = matrix(rows=11), second_moments(inputs())
    latent, scales = gptq(w, h, "q4_0")
    for row in (0, 7, 10):
        alone, alone_scales = gptq(w[row : row + 1], h, "q4_0")
        np.testing.assert_array_equal(alone[0], latent[row])
        np.testing.assert_array_equal(alone_scales[0], scales[row])


def test_dead_inputs_are_rounded_as_they_are():
    x = inputs()
    dead = [0, 31, 32, 255]
    x[:, dead] = 0
    w, h = matrix(), second_moments(x)
    latent, scales = gptq(w, h, "int4_channel", scale="reference")
    np.testing.assert_array_equal(latent[:, dead], w[:, dead])
    _, shipped, _ = textbook(w, h, "int4_channel")
    np.testing.assert_array_equal(decoded(latent, scales, "int4_channel"), shipped)


def test_inputs_that_were_never_anything_but_zero_leave_rounding():
    w = matrix()
    for scale, rule in (("reference", "reference"), ("weighted", "search")):
        latent, scales = gptq(w, np.zeros((WIDTH, WIDTH)), "q4_0", scale=scale)
        np.testing.assert_array_equal(latent, w)
        np.testing.assert_array_equal(scales, _core.grid_choose("q4_0", w, rule))


def test_one_token_is_enough_with_damping():
    """The hessian of one token has rank 1: GPTQ keeps that token's output, and the damping all the rest."""
    x = inputs(tokens=1)
    w, h = matrix(), second_moments(x)
    latent, scales = gptq(w, h, "q4_0", scale="reference")
    nearest = layer_error(w, decoded(w, reference_scales(w, "q4_0"), "q4_0"), h)
    assert layer_error(w, decoded(latent, scales, "q4_0"), h) < 0.05 * nearest
    with pytest.raises(libqat.NumericError, match=r"gptq: up: expected a hessian that is positive definite"):
        gptq(w, h, "q4_0", damping=0.0, tensor="up")


def test_gptq_refuses():
    w, h = matrix(), second_moments(inputs())
    bad = h.copy()
    bad[3, 4] = np.nan
    with pytest.raises(libqat.NumericError, match=r"gptq: layer\.up: expected a finite hessian"):
        gptq(w, bad, "q4_0", tensor="layer.up")
    bad = w.copy()
    bad[2, 3] = np.inf
    with pytest.raises(libqat.NumericError, match="gptq: up: expected a finite weight"):
        gptq(bad, h, "q4_0", tensor="up")
    with pytest.raises(
        libqat.ArgumentError, match=r"hessian of float32 or float64\[256, 256\], got Double\[255"
    ):
        gptq(w, h[1:, 1:].copy(), "q4_0")
    with pytest.raises(libqat.ArgumentError, match="rows that blocks of 32 divide"):
        gptq(w[:, :40].copy(), h[:40, :40].copy(), "q4_0")
    with pytest.raises(libqat.ArgumentError, match="a grid with codes, got bf16"):
        gptq(w, h, "bf16")
    with pytest.raises(libqat.ArgumentError, match="damping of at least 0"):
        gptq(w, h, "q4_0", damping=-1.0)
    with pytest.raises(libqat.ArgumentError, match="block of at least 1"):
        gptq(w, h, "q4_0", block=0)
    with pytest.raises(libqat.ArgumentError, match="reference, search, weighted"):
        gptq(w, h, "q4_0", scale="best")
    bad = w.copy()
    bad[5] *= 1e9
    with pytest.raises(libqat.NumericError, match="gptq: up: row 5 has a value or scale beyond"):
        gptq(bad, h, "q4_0", tensor="up", scale="reference")


def test_convolutions_keep_their_shape():
    w = torch.from_numpy(matrix().reshape(12, 16, 4, 4))
    latent, scales = _core.gptq_tensor(w, torch.eye(WIDTH), "q4_0")
    assert latent.shape == w.shape
    assert scales.shape == (12, 8, 1)


def test_the_operators_decode_the_solution():
    """The scales go through `store` and back out of the checkpoint's operators."""
    w, h = matrix(), second_moments(inputs())
    latent, scales = gptq(w, h, "q4_0")
    codes = torch.from_numpy(_core.grid_encode("q4_0", latent, scales))
    stored = torch.from_numpy(_core.grid_store("q4_0", scales, WIDTH))
    np.testing.assert_array_equal(
        ops.dequantize(codes, stored, "q4_0").numpy(), decoded(latent, scales, "q4_0")
    )
