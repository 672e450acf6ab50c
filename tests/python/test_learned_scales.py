"""Learned scales and the estimators: gradients against float64 formulas, and what ships is what trained."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, make_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import libqat
from libqat import ops

LSQ = {"kind": "lsq"}
SIGNED = ("q4_0", "q5_0", "q8_0", "q2_0", "tq2_0", "int4_g32", "int4_channel", "int8_tensor")
OFFSET = ("q4_1", "mlx4_g32", "int4_g32_asym")
INTEGER = [name for name, grid in libqat.grids().items() if grid.codes]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(seed=0):
    """Rows of 256 weights of other sizes; all grids divide them."""
    return normal(6, 256, seed=seed) * torch.tensor([0.02, 0.05, 0.1, 0.3, 1.0, 3.0])[:, None]


def moved(scales, seed=1, most=0.3):
    """Scales away from the rule's, so that weights are clipped and no gradient is trivially zero."""
    return scales * (1 - most * torch.rand(scales.shape, generator=torch.Generator().manual_seed(seed)))


def block_of(grid, weight):
    info = libqat.grids()[grid]
    return weight.numel() if info.whole_tensor else info.block or weight.shape[1]


def with_learned(weight, scales, grid, gradient, kind="clipped_ste", scale_gradient="plain"):
    """dL/dw and dL/ds of sum(gradient * w_hat)."""
    weight, scales = weight.clone().requires_grad_(), scales.clone().requires_grad_()
    w_hat = ops.fake_quantize(weight, grid, kind, "learned", "w", scales, scale_gradient)
    w_hat.backward(gradient)
    return weight.grad, scales.grad


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


@pytest.mark.parametrize("grid", INTEGER)
@pytest.mark.parametrize("rule", ["reference", "search"])
def test_learned_scales_from_a_rule_are_the_rules_bits(grid, rule):
    weight = weight_of(3)
    scales = ops.choose_scales(weight, grid, rule)
    info = libqat.grids()[grid]
    groups = 1 if info.whole_tensor or info.block is None else 256 // info.block
    assert scales.shape == (1 if info.whole_tensor else 6, groups, sum(f[1] for f in info.fields))
    assert not scales.requires_grad
    expected = ops.fake_quantize(weight, grid, scale=rule)
    assert torch.equal(ops.fake_quantize(weight, grid, "ste", "learned", "w", scales), expected)
    assert torch.equal(ops.dequantize(*ops.quantize(weight, grid, "learned", "w", scales), grid), expected)
    x = normal(3, 256, seed=4)
    linear = ops.quantized_linear(x, weight, None, grid, "ste", "learned", "w", scales)
    assert torch.equal(linear, nn.functional.linear(x, expected))
    low = ops.quantized_linear(x.bfloat16(), weight, None, grid, "ste", "learned", "w", scales)
    assert torch.equal(low, nn.functional.linear(x.bfloat16(), expected.bfloat16()))
    indices = torch.tensor([[5, 0], [5, 2]])
    rows = ops.quantized_embedding(indices, weight, None, grid, "ste", "learned", "w", scales)
    assert torch.equal(rows, expected[indices])


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


def test_scales_are_given_exactly_when_they_are_learned():
    weight = weight_of()
    scales = ops.choose_scales(weight, "q4_0")
    with pytest.raises(
        libqat.ArgumentError, match=r"w: expected scales exactly when .*, got none with learned"
    ):
        ops.fake_quantize(weight, "q4_0", "ste", "learned", "w")
    with pytest.raises(libqat.ArgumentError, match="got scales with search on q4_0"):
        ops.quantized_linear(weight, weight, None, "q4_0", "ste", "search", "w", scales)
    with pytest.raises(libqat.ArgumentError, match="got scales with learned on bf16"):
        ops.fake_quantize(weight, "bf16", "ste", "learned", "w", scales)
    for bad in (scales[:5], scales[..., :0], scales.double(), scales.flatten()):
        with pytest.raises(libqat.ArgumentError, match=r"w: expected scales of float32\[6, 8, 1\] on cpu"):
            ops.quantize(weight, "q4_0", "learned", "w", bad)
    with pytest.raises(libqat.ArgumentError, match="a rule that gives scales"):
        ops.choose_scales(weight, "q4_0", "learned")
    with pytest.raises(libqat.ArgumentError, match="a grid with codes"):
        ops.choose_scales(weight, "bf16")
    with pytest.raises(libqat.ArgumentError, match="scale_gradient: expected one of lsq, tensor, plain"):
        ops.fake_quantize(weight, "q4_0", "ste", "learned", "w", scales, "row")
    with pytest.raises(libqat.UnsupportedError, match="w: expected a grid whose scale rule has a gradient"):
        ops.fake_quantize(weight, "q4_k", "ste", "differentiated", "w")
    spoiled = scales.clone()
    spoiled[2, 3] = float("nan")
    with pytest.raises(libqat.NumericError, match="w: row 2 is not finite"):
        ops.fake_quantize(weight, "q4_0", "ste", "learned", "w", spoiled)


def test_operators_inside_pytorch():
    weight, x = weight_of().requires_grad_(), normal(3, 256).requires_grad_()
    scales = moved(ops.choose_scales(weight, "q4_0")).requires_grad_()
    library = torch.ops.libqat
    held = ("q4_0", "clipped_ste", "learned", "w", scales, "lsq")
    torch.library.opcheck(library.fake_quantize.default, (weight, *held))
    torch.library.opcheck(library.quantized_linear.default, (x, weight, None, *held))
    torch.library.opcheck(library.quantized_embedding.default, (torch.tensor([1, 5]), weight, -1, *held))
    torch.library.opcheck(library.choose_scales.default, (weight, "q4_0", "search", "w"))
    torch.library.opcheck(library.quantize.default, (weight, "q4_0", "learned", "w", scales))
    detached = weight.detach(), scales.detach()
    gradient = normal(6, 256)
    torch.library.opcheck(library.fake_quantize_backward_scales.default, (gradient, *detached, "q4_0"))
    y = ops.quantized_linear(x, weight, None, *held).square().sum()
    [by_scales] = torch.autograd.grad(y, scales, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for libqat::quantized_linear_grad_scales is not impl"):
        by_scales.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        low = ops.quantized_linear(x, weight, None, *held)
    assert low.dtype == torch.bfloat16
    low.sum().backward()
    assert scales.grad.dtype == torch.float32


def model_of(policy, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 20, bias=False))
    model[3].weight = model[0].weight
    return model, libqat.prepare(model, policy)


ALL_LSQ = {"rules": [{"match": ".*", "weight": "q4_0"}], "estimator": LSQ}


def test_weight_scales_are_parameters_of_the_layers():
    model, prepared = model_of(ALL_LSQ)
    assert list(prepared.scale_parameters()) == ["0.weight_scales", "1.weight_scales"]
    assert model[0].weight_scales is model[3].weight_scales
    assert sum(p is model[0].weight_scales for p in model.parameters()) == 1
    assert isinstance(model[1].weight_scales, nn.Parameter)
    assert torch.equal(model[1].weight_scales, ops.choose_scales(model[1].weight, "q4_0"))
    assert model.state_dict()["1.weight_scales"].shape == (64, 2, 1)
    ids = torch.tensor([[1, 2, 3]])
    model(ids).square().sum().backward()
    assert all(scales.grad.abs().sum() > 0 for scales in prepared.scale_parameters().values())

    with torch.no_grad():
        for scales in prepared.scale_parameters().values():
            scales.mul_(-1.25)
    expected = model(ids)
    other, _ = model_of(ALL_LSQ, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(copied(ids), expected)
        assert copied[0].weight_scales is copied[3].weight_scales
        assert copied[0].weight_scales is not model[0].weight_scales
    checkpoint = libqat.freeze(prepared)
    assert not any("scales" in name for name in checkpoint.floats)
    assert set(checkpoint.quantized) == {"0.weight", "1.weight"}
    for key in checkpoint.quantized:
        layer = model[int(key[0])]
        assert torch.equal(checkpoint.weight(key), layer.fake_quantized().detach())
    names = {row.name for row in prepared.report()}
    assert names == {"0.weight", "1.weight", "1.bias"}

    libqat.unprepare(model)
    assert set(model.state_dict()) == {"0.weight", "1.weight", "1.bias", "3.weight"}
    assert not hasattr(model[1], "weight_scales")


def test_half_keeps_learned_scales_in_float32():
    model, prepared = model_of(ALL_LSQ)
    before = {name: scales.detach().clone() for name, scales in prepared.scale_parameters().items()}
    with pytest.warns(UserWarning, match="keeps its latents in float32"):
        model.half()
    for name, scales in prepared.scale_parameters().items():
        assert scales.dtype == torch.float32
        assert torch.equal(scales, before[name])
    assert model[1].bias.dtype == torch.float16


def test_rules_have_estimators_of_their_own():
    policy = {
        "rules": [
            {"match": "1", "weight": "q4_0", "estimator": LSQ},
            {"match": "0", "weight": "q8_0"},
        ],
        "estimator": {"kind": "ste", "scale": "search"},
    }
    model, prepared = model_of(policy)
    assert list(prepared.scale_parameters()) == ["1.weight_scales"]
    assert (model[1].weight_quantizer.estimator, model[1].weight_quantizer.scale) == (
        "clipped_ste",
        "learned",
    )
    assert model[0].weight_quantizer.scale == "search"
    checkpoint = libqat.freeze(prepared)
    assert torch.equal(
        checkpoint.weight("0.weight"), ops.fake_quantize(model[0].weight, "q8_0", scale="search")
    )
    targets = [("1.weight", "linear", (64, 64)), ("0.weight", "embedding", (20, 64))]
    assert prepared.policy.estimators(targets) == [libqat.Estimator("lsq"), libqat.Estimator("ste", "search")]
    same = prepared.policy.with_estimator(libqat.Estimator("lsq", scale_gradient="tensor"))
    assert same.estimators(targets) == [libqat.Estimator("clipped_ste", "learned", "tensor")] * 2
    assert repr(libqat.Estimator("lsq")) == "Estimator('clipped_ste', 'learned', 'lsq')"
    assert len({libqat.Estimator("lsq"), libqat.Estimator("clipped_ste", "learned")}) == 1
    with pytest.raises(libqat.ArgumentError, match="lsq: expected the scale rule learned"):
        libqat.Estimator("lsq", "search")
    with pytest.raises(libqat.ArgumentError, match="expected one of ste, clipped_ste"):
        libqat.Estimator("lsqq")


def test_blend_and_training_grid():
    model, prepared = model_of(ALL_LSQ)
    x = normal(3, 64)
    layer = model[1]
    quantized = layer(x).detach()
    as_float = nn.functional.linear(x, layer.weight, layer.bias).detach()
    layer.weight_quantizer.blend = 0.25
    # lerp rounds: 1e-6 is some steps of float32
    torch.testing.assert_close(layer(x), 0.75 * as_float + 0.25 * quantized, rtol=1e-6, atol=1e-6)
    layer.weight_quantizer.blend = 0.0
    assert torch.equal(layer(x), as_float)
    layer.weight_quantizer.blend = 1.0

    former = layer.weight_scales
    prepared.set_training_grid("q8_0")
    assert layer.weight_scales is not former
    assert model[0].weight_scales is model[3].weight_scales
    w_hat = ops.fake_quantize(layer.weight, "q8_0", scale="search")
    assert torch.equal(layer(x), nn.functional.linear(x, w_hat, layer.bias))
    assert libqat.freeze(prepared).grids == {"0.weight": "q4_0", "1.weight": "q4_0"}
    prepared.set_training_grid("bf16")
    assert layer.weight_scales is None
    prepared.set_training_grid("")
    assert torch.equal(layer.weight_scales, former)
    with pytest.raises(libqat.ArgumentError, match="q9"):
        prepared.set_training_grid("q9")


def test_scales_start_anew_after_loading_weights():
    model, prepared = model_of(ALL_LSQ)
    scales = model[1].weight_scales
    with torch.no_grad():
        model[1].weight.mul_(3)
    prepared.initialize_scales("reference")
    assert model[1].weight_scales is scales
    assert torch.equal(scales, ops.choose_scales(model[1].weight, "q4_0", "reference"))


def test_parameter_groups_measure_scales_in_their_own_size():
    model, prepared = model_of(ALL_LSQ)
    weights, *scales = libqat.parameter_groups(prepared, learning_rate=1e-3, scale_learning_rate=1e-2)
    assert weights["lr"] == 1e-3
    assert {id(p) for p in weights["params"]} == {id(model[0].weight), id(model[1].weight), id(model[1].bias)}
    for group, parameter in zip(scales, prepared.scale_parameters().values(), strict=True):
        assert group["params"][0] is parameter
        assert group["lr"] == pytest.approx(1e-2 * parameter.abs().mean().item())
        assert group["weight_decay"] == 0
    optimizer = torch.optim.AdamW([weights, *scales])
    before = model[1].weight_scales.detach().clone()
    model(torch.tensor([[1, 2]])).square().sum().backward()
    optimizer.step()
    # Adam's first step is its learning rate wherever there is a gradient
    step = (model[1].weight_scales - before).abs().max().item()
    assert step == pytest.approx(1e-2 * before.abs().mean().item(), rel=1e-3)
    assert len(libqat.parameter_groups(model, 1e-3, 0.0)) == 1
    with pytest.raises(libqat.ArgumentError, match="scale_learning_rate: expected at least 0"):
        libqat.parameter_groups(prepared, 1e-3, -1.0)


@pytest.mark.parametrize("grid", ["q4_0", "mlx4_g64", "mxfp4"])
def test_training_moves_scales_downhill_and_ships_what_it_trained(grid, tmp_path):
    policy = {"rules": [{"match": "1", "weight": grid}], "estimator": LSQ}
    model, prepared = model_of(policy)
    target = normal(64, 64, seed=7) * 0.2
    x = normal(128, 64, seed=8)
    optimizer = torch.optim.AdamW(libqat.parameter_groups(prepared, 1e-2, 2e-2))
    losses = []
    for _ in range(40):
        loss = (model[1](x) - x @ target.T).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    path = tmp_path / "m.qat.safetensors"
    libqat.save(libqat.freeze(prepared), path)
    assert torch.equal(libqat.load(path).weight("1.weight"), model[1].fake_quantized().detach())


def shaken(scales, generator):
    """What a wild optimizer may leave: moved, turned around, 0, tiny, large."""
    pick = torch.rand(scales.shape, generator=generator)
    scales = scales * (1 + 0.3 * torch.randn(scales.shape, generator=generator))
    scales = torch.where(pick < 0.1, -scales, scales)
    scales = torch.where(pick > 0.9, torch.zeros(()), scales)
    scales = torch.where((pick > 0.8) & (pick < 0.85), scales * 1e-9, scales)
    return torch.where((pick > 0.85) & (pick < 0.9), scales * 10, scales)


@pytest.mark.parametrize("grid", INTEGER)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]))
def test_learned_scales_are_legal_whatever_becomes_of_them(grid, seed, size):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 256, generator=generator) * size
    scales = shaken(ops.choose_scales(weight, grid), generator)
    try:
        w_hat = ops.fake_quantize(weight, grid, "ste", "learned", "w", scales)
    except libqat.NumericError:
        with pytest.raises(libqat.NumericError):
            ops.quantize(weight, grid, "learned", "w", scales)
        return
    codes, stored = ops.quantize(weight, grid, "learned", "w", scales)
    assert (ops.dequantize(codes, stored, grid) != w_hat).sum() == 0
    # what was stored is legal: stored again it is itself
    again = ops.fake_quantize(weight, grid, "ste", "learned", "w", stored)
    assert torch.isfinite(again).all()


EXPORTS = {
    "gguf": ["q4_0", "q4_1", "q5_0", "q8_0", "q2_0", "q4_k", "q6_k", "mxfp4"],
    "compressed-tensors": ["int4_g32", "int4_channel", "int8_channel"],
    "mlx": ["mlx4_g64", "mlx3_g64", "mlx2_g64"],
}


@pytest.mark.parametrize(
    ("target", "grid"), [(target, grid) for target, grids in EXPORTS.items() for grid in grids]
)
def test_exported_files_hold_the_learned_scales(target, grid, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 256} if grid.endswith("_k") else {}
    model = make_llama(num_hidden_layers=1, **wide).eval()
    prepared = libqat.prepare(
        model, {"rules": [{"match": r".*layers\..*_proj", "weight": grid}], "estimator": LSQ}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for scales in prepared.scale_parameters().values():
            scales.copy_(shaken(scales, generator))
    ids = torch.randint(VOCABULARY, (2, 8), generator=generator)
    expected = model(ids).logits
    checkpoint = libqat.freeze(prepared, tokenizer="none")
    libqat.save(checkpoint, tmp_path / "m.qat.safetensors")
    loaded = libqat.load(tmp_path / "m.qat.safetensors")
    for name, layer in ((s.name, s.layers[0][1]) for s in prepared.slots):
        assert (loaded.weight(name) != layer.fake_quantized()).sum() == 0
    path = tmp_path / ("m.gguf" if target == "gguf" else "m")
    libqat.export(loaded, path, target=target)
    assert libqat.verify(path, checkpoint) == []
    plain = make_llama(num_hidden_layers=1, **wide).eval()
    # the head is tied by the configuration, which leaves its key out
    plain.load_state_dict(dict(libqat.dequantize(loaded)), strict=False)
    # another kernel multiplies: float32 rounding of logits
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)
