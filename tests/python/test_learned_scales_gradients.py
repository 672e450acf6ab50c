"""Learned scales and the estimators: gradients against float64 formulas."""

import numpy as np
import pytest
import torch
from learned_scales import block_of, moved, normal, weight_of, with_learned

import libqat
from libqat import ops

SIGNED = ("q4_0", "q5_0", "q8_0", "q2_0", "tq2_0", "int4_g32", "int4_channel", "int8_tensor")
OFFSET = ("q4_1", "mlx4_g32", "int4_g32_asym")


class Blocks:
    """A weight on a grid as float64 blocks [blocks, B], by formulas of this file alone."""

    def __init__(self, weight, scales, grid, gradient):
        size = block_of(grid, weight)
        codes, stored = ops.quantize(weight, grid, "learned", "w", scales)
        rows = lambda tensor: tensor.double().numpy().reshape(-1, size)  # noqa: E731
        self.w, self.q, self.g = rows(weight), rows(codes), rows(gradient)
        self.s = scales.double().numpy().reshape(self.w.shape[0], -1)
        self.stored = stored.double().numpy().reshape(self.w.shape[0], -1)
        self.low, self.high = libqat.grids()[grid].codes

    def inside(self, position, slack=1e-5):
        """Whether the unrounded code is in the code range; weights on its border count as inside."""
        return (position >= self.low - slack) & (position <= self.high + slack)


@pytest.mark.parametrize("grid", SIGNED)
def test_lsq_of_a_grid_with_one_scale(grid):
    weight, gradient = weight_of(), normal(6, 256, seed=9)
    scales = moved(ops.choose_scales(weight, grid, "reference"))
    by_weight, by_scales = with_learned(weight, scales, grid, gradient)
    b = Blocks(weight, scales, grid, gradient)
    position = b.w / b.s
    inside = b.inside(position)
    assert 0 < (~inside).mean() < 0.5  # both branches are taken
    np.testing.assert_array_equal(by_weight.numpy().reshape(b.w.shape), np.where(inside, b.g, 0))
    expected = (b.g * np.where(inside, b.q - position, b.q)).sum(1)
    # float32 sums of up to 1536 products
    np.testing.assert_allclose(by_scales.flatten(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("grid", OFFSET)
def test_lsq_plus_of_a_grid_with_an_offset(grid):
    weight, gradient = weight_of(), normal(6, 256, seed=9)
    start = ops.choose_scales(weight, grid, "reference")
    scales = torch.stack([moved(start[..., 0]), start[..., 1]], -1)
    by_weight, by_scales = with_learned(weight, scales, grid, gradient)
    b = Blocks(weight, scales, grid, gradient)
    zero_point = grid.startswith("int")
    s, second = b.s[:, :1], b.s[:, 1:]
    place = b.w / s + np.round(second) if zero_point else (b.w - second) / s
    # a rounded zero point may move an end by half a step: it counts as inside (numerics.md)
    inside = b.inside(place, 0.5 if zero_point else 1e-5)
    assert 0.01 < (~inside).mean() < 0.5
    np.testing.assert_array_equal(by_weight.numpy().reshape(b.w.shape), np.where(inside, b.g, 0))
    level = b.q - np.round(second) if zero_point else b.q
    position = b.w / s if zero_point else place
    by_step = (b.g * np.where(inside, level - position, level)).sum(1)
    by_offset = (b.g * np.where(inside, 0, -b.stored[:, :1] if zero_point else 1)).sum(1)
    expected = np.stack([by_step, by_offset], -1)
    # float32 sums of 32 products
    np.testing.assert_allclose(by_scales.reshape(expected.shape), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("grid", ["q8_0", "int4_channel"])
def test_trust_mask_and_stable_qat(grid):
    weight, gradient = weight_of(), normal(6, 256, seed=9)
    scales = moved(ops.choose_scales(weight, grid, "reference"))
    b = Blocks(weight, scales, grid, gradient)
    inside = b.inside(b.w / b.s)
    by_weight, _ = with_learned(weight, scales, grid, gradient, "stable_qat")
    error = b.q - b.w / b.s
    swing = np.sqrt(2) * np.pi * 0.21 * np.cos(np.pi * error)
    expected = np.where(inside, b.g * (1 - swing) / (1 + swing), 0)
    # the grid computes the cosine in float32 by a series
    np.testing.assert_allclose(by_weight.numpy().reshape(b.w.shape), expected, rtol=1e-4, atol=1e-5)

    by_weight, _ = with_learned(weight, scales, grid, gradient, "trust_mask")
    rows = weight.double().numpy()
    levels = b.high - b.low + 1
    # the MSE-optimal range of a normal distribution: Max's table of uniform quantizers, 16 and 256 levels
    optimal = {15: 2.5139, 16: 2.5139, 255: 3.8849, 256: 3.8849}[levels]
    threshold = optimal * np.sqrt((rows**2).mean(1, keepdims=True)) / (levels - 1)
    w_hat = (b.q * b.stored).reshape(rows.shape)
    trusted = np.abs(w_hat - rows) <= threshold
    assert 0.001 < (~trusted).mean() < 0.9
    np.testing.assert_array_equal(by_weight, np.where(trusted, gradient.double().numpy(), 0))


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "int4_channel", "int8_tensor", "mlx4_g32"])
@pytest.mark.parametrize("kind", ["ste", "clipped_ste"])
def test_differentiated_adds_what_passes_through_the_rule(grid, kind):
    weight, gradient = weight_of(), normal(6, 256, seed=9)
    latent = weight.clone().requires_grad_()
    ops.fake_quantize(latent, grid, kind, "differentiated").backward(gradient)
    assert torch.equal(
        ops.fake_quantize(weight, grid, kind, "differentiated"), ops.fake_quantize(weight, grid)
    )
    scales = ops.choose_scales(weight, grid, "reference")
    by_weight, by_scales = with_learned(weight, scales, grid, gradient, kind)
    through = (latent.grad - by_weight).double()
    # between jumps the rules are linear in the weights that decide them, so differences are exact
    size = block_of(grid, weight)
    blocks = weight.reshape(-1, size)
    at = torch.arange(len(blocks))

    def change(places, step):
        nudged = blocks.clone()
        nudged[at, places] += step * blocks[at, places]
        moved = ops.choose_scales(nudged.reshape(weight.shape), grid, "reference") - scales
        return moved.reshape(len(blocks), -1).double() / step

    for places in (blocks.argmax(1), blocks.argmin(1)):
        slope, other = change(places, 0.01), change(places, -0.01)
        # differences of float32 scales, divided by 0.01: 1e-7 becomes 1e-5 of a scale
        smooth = torch.isclose(slope, other, rtol=1e-4, atol=1e-6).all(1)
        assert smooth.double().mean() > 0.3  # elsewhere another weight decides after the nudge
        slope = slope / blocks[at, places][:, None]
        expected = (slope * by_scales.reshape(len(blocks), -1)).sum(1)
        found = through.reshape(-1, size)[at, places]
        torch.testing.assert_close(found[smooth], expected.double()[smooth], rtol=1e-3, atol=1e-3)
    assert (through.reshape(-1, size) != 0).sum(1).max() <= 2


@pytest.mark.parametrize("grid", ["q4_0", "int4_channel", "int8_tensor", "mlx4_g32", "q4_k", "q6_k"])
def test_scale_gradient_factors(grid):
    weight, gradient = weight_of(), normal(6, 256, seed=9)
    info = libqat.grids()[grid]
    scales = moved(ops.choose_scales(weight, grid, "reference"), most=0.1)
    by_rule = {
        rule: with_learned(weight, scales, grid, gradient, scale_gradient=rule)[1]
        for rule in ("plain", "lsq", "tensor")
    }
    sharing = np.concatenate([[block_of(grid, weight) / count] * count for _, count, _ in info.fields])
    lsq = torch.tensor(1 / np.sqrt(sharing * info.codes[1]), dtype=torch.float32)
    torch.testing.assert_close(by_rule["lsq"], by_rule["plain"] * lsq)
    torch.testing.assert_close(
        by_rule["tensor"], by_rule["plain"] / float(np.sqrt(weight.numel() * info.codes[1]))
    )


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "int8_tensor", "q4_k", "mxfp4"])
@pytest.mark.parametrize("kind", ["ste", "clipped_ste", "trust_mask", "stable_qat"])
def test_every_layer_has_the_gradients_of_fake_quantize(grid, kind):
    weight = weight_of()
    scales = moved(ops.choose_scales(weight, grid, "reference"), most=0.1)
    x, bias, upstream = normal(5, 256, seed=2), normal(6, seed=3), normal(5, 6, seed=4)
    latent, s = weight.clone().requires_grad_(), scales.clone().requires_grad_()
    leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    y = ops.quantized_linear(leaves[0], latent, leaves[1], grid, kind, "learned", "w", s)
    y.backward(upstream)
    by_weight, by_scales = with_learned(weight, scales, grid, upstream.T @ x, kind, "lsq")
    assert torch.equal(latent.grad, by_weight)
    assert torch.equal(s.grad, by_scales)
    w_hat = ops.fake_quantize(weight, grid, kind, "learned", "w", scales)
    assert torch.equal(leaves[0].grad, upstream @ w_hat)
    assert torch.equal(leaves[1].grad, upstream.sum(0))

    only = scales.clone().requires_grad_()  # no bias, a latent that is held still
    ops.quantized_linear(x, weight, None, grid, kind, "learned", "w", only).backward(upstream)
    assert torch.equal(only.grad, by_scales)

    for rule in ("lsq", "tensor"):
        latent, s = weight.clone().requires_grad_(), scales.clone().requires_grad_()
        indices = torch.tensor([4, 1, 4])
        rows = ops.quantized_embedding(indices, latent, 1, grid, kind, "learned", "w", s, rule)
        rows.backward(normal(3, 256, seed=5))
        dense = torch.zeros(6, 256)
        dense[4] = normal(3, 256, seed=5)[[0, 2]].sum(0)  # row 1 is the padding
        by_weight, by_scales = with_learned(weight, scales, grid, dense, kind, rule)
        assert torch.equal(latent.grad, by_weight)
        torch.testing.assert_close(s.grad, by_scales)  # the factor comes before or after the sum
