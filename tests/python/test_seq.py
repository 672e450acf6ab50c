"""SEQ (ParetoQ): balanced half-integer levels in operators, policies, layers, trained through their tie."""

import copy
import json

import numpy as np
import pytest
import torch
from learned_scales import normal, weight_of
from libqat.grids import grid as info_of
from libqat.weight_quantizer import WeightQuantizer
from seq_policies import PROJECTIONS, SEQ
from torch import nn

import libqat
from libqat import _core, ops

GRIDS = ["mlx2_g32", "mlx2_g64@bf16", "mlx3_g128@fp16", "mlx4_g32", "q2_k"]


def free_of(weight, grid):
    """Free parameters below the start, so that weights are clipped; sub-scales that the file holds."""
    free = ops.seq_start(weight, grid, "reference") * 0.8
    return free if grid != "q2_k" else torch.cat([free[..., :1], free[..., 1:].round().clamp(1)], -1)


def by_weight(values):
    """[6, G, a] -> [6, 256], each value for all weights that share it."""
    return np.repeat(values, 256 // (values.shape[1] * values.shape[2]), axis=-1).reshape(6, 256)


@pytest.mark.parametrize("grid", GRIDS)
def test_levels_and_gradients_are_those_of_the_paper(grid):
    weight, gradient = weight_of(), normal(6, 256, seed=9)
    latent, free = weight.clone().requires_grad_(), free_of(weight, grid).requires_grad_()
    w_hat = ops.fake_quantize(latent, grid, "clipped_ste", "learned", "w", ops.seq_tie(free, grid), "plain")
    w_hat.backward(gradient)

    # alpha with the numbers that the file holds, all else in float64
    _, stored = ops.quantize(weight, grid, "learned", "w", ops.seq_tie(free, grid).detach())
    stored = stored.double().numpy()
    k = 2 ** (info_of(grid).bits - 1)
    alpha = by_weight(2 * stored[..., :1] * stored[..., 2:18] if grid == "q2_k" else k * stored[..., :1])
    w, got, g = weight.double().numpy(), w_hat.detach().double().numpy(), gradient.double().numpy()
    levels = 2 * k * got / alpha
    assert set(levels.ravel()) == {float(n) for n in range(1 - 2 * k, 2 * k, 2)}
    place = w / alpha * k - 0.5
    expected = (np.clip(np.round(place), -k, k - 1) + 0.5) / k * alpha
    tie = np.abs(np.abs(place - np.floor(place)) - 0.5) < 1e-5  # either level in float32
    np.testing.assert_array_equal(got[~tie], expected[~tie])

    outermost = 1 - 1 / (2 * k)
    inside = np.abs(w) <= alpha * outermost * (1 + 1e-6)
    assert 0.001 < (~inside).mean() < 0.5
    assert (np.abs(np.abs(w) / alpha - outermost) > 1e-5).all()  # no weight for which float32 could decide
    np.testing.assert_array_equal(latent.grad, np.where(inside, g, 0))
    of_alpha = g * np.where(inside, (got - w) / alpha, np.sign(got) * outermost)
    if grid == "q2_k":  # alpha = 2 d sub_scale
        d = stored[..., 0]
        by_d = (of_alpha * alpha / d).sum(-1, keepdims=True)
        of_free = np.concatenate([by_d, 2 * d * of_alpha.reshape(6, 16, 16).sum(-1)], -1)[:, None]
    else:
        of_free = of_alpha.reshape(6, -1, info_of(grid).block).sum(-1, keepdims=True)
    # float32 sums of up to 256 products, of up to 30 each for d
    np.testing.assert_allclose(free.grad, of_free, rtol=2e-4, atol=1e-2 if grid == "q2_k" else 2e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_factor_of_the_gradient_is_that_of_learned_scales(grid):
    weight, gradient = weight_of(), normal(6, 256, seed=9)
    found = {}
    for rule in ("plain", "lsq"):
        free = free_of(weight, grid).requires_grad_()
        scales = ops.seq_tie(free, grid)
        ops.fake_quantize(weight, grid, "ste", "learned", "w", scales, rule).backward(gradient)
        found[rule] = free.grad.double()
    info = info_of(grid)
    sharing = torch.tensor([256.0] + [16.0] * 16 if grid == "q2_k" else [float(info.block)])
    torch.testing.assert_close(found["lsq"], found["plain"] / (sharing * info.codes[1]).sqrt().double())


def test_where_it_starts_and_what_ties_back():
    weight = weight_of()
    for grid in GRIDS:
        largest, found = ops.seq_start(weight, grid, "reference"), ops.seq_start(weight, grid)
        info = info_of(grid)
        assert largest.shape == found.shape == (6, 256 // info.block, 17 if grid == "q2_k" else 1)

        def error(free, grid=grid, block=info.block):
            w_hat = ops.fake_quantize(weight, grid, "ste", "learned", "w", ops.seq_tie(free, grid))
            return (w_hat - weight).double().square().reshape(6, -1, block).sum(-1)

        assert (error(found) <= error(largest)).all()
        assert error(found).sum() < 0.97 * error(largest).sum()
        scales = ops.seq_tie(found, grid)
        assert torch.equal(ops.seq_tie(_core.seq_untie(scales, grid), grid), scales)
    assert torch.equal(
        ops.seq_start(weight, "mlx2_g64", "reference")[..., 0], weight.reshape(6, 4, 64).abs().amax(-1)
    )
    with pytest.raises(libqat.ArgumentError, match="w: expected scales that are tied as SEQ ties them"):
        _core.seq_untie(ops.choose_scales(weight, "mlx2_g32"), "mlx2_g32", "w")
    for grid in GRIDS:
        zeros = torch.zeros(2, 256)
        free = ops.seq_start(zeros, grid)
        assert torch.equal(free, torch.zeros_like(free))
        w_hat = ops.fake_quantize(zeros, grid, "ste", "learned", "w", ops.seq_tie(free, grid))
        assert torch.equal(w_hat, zeros)
    with pytest.raises(libqat.NumericError, match="w: row 1 is not finite"):
        ops.seq_start(torch.tensor([[0.0] * 32, [float("nan")] * 32]), "mlx2_g32", "search", "w")


def test_operators_refuse_what_does_not_fit_and_work_inside_pytorch():
    weight = weight_of()
    free = free_of(weight, "mlx2_g32").requires_grad_()
    torch.library.opcheck(torch.ops.libqat.seq_tie.default, (free, "mlx2_g32", "w"))
    torch.library.opcheck(torch.ops.libqat.seq_start.default, (weight, "q2_k", "search", "w"))
    with pytest.raises(libqat.ArgumentError, match=r"seq_tie: w: .*float32\[R, G, 1\], got Float\[6, 8, 2\]"):
        ops.seq_tie(free.repeat(1, 1, 2), "mlx2_g32", "w")
    with pytest.raises(libqat.ArgumentError, match=r"w: expected a grid that holds SEQ \(.*q2_k.*, got q4_0"):
        ops.seq_start(weight, "q4_0", "search", "w")
    with pytest.raises(libqat.ArgumentError, match="w: expected the rule reference or search"):
        ops.seq_start(weight, "mlx2_g32", "learned", "w")
    with pytest.raises(
        libqat.ArgumentError, match="w: expected the rule learned, with the scales that seq_t"
    ):
        ops.fake_quantize(weight, "mlx2_g32", "ste", "seq", "w")


def test_policies_name_it():
    policy = libqat.Policy.from_json(json.dumps(PROJECTIONS))
    document = json.loads(policy.to_json())
    assert document["estimator"] == {"kind": "clipped_ste", "scale": "seq"}
    assert libqat.Policy.from_json(policy.to_json()) == policy
    own = {"rules": [{"match": "a", "weight": "q2_k", "estimator": {"kind": "ste", "scale": "seq"}}]}
    again = libqat.Policy.from_json(libqat.Policy.from_json(json.dumps(own)).to_json())
    target = ("a.weight", "linear", (4, 256))
    assert again.estimators([target]) == [libqat.Estimator("ste", "seq")]
    assert libqat.Estimator("seq") == libqat.Estimator("clipped_ste", "seq")
    with pytest.raises(libqat.ArgumentError, match="seq: expected the scale rule seq, or none, got"):
        libqat.Estimator("seq", "learned")
    with pytest.raises(libqat.ArgumentError, match=r'estimator.scale: expected "seq" for the kind seq'):
        libqat.Policy.from_json('{"rules": [], "estimator": {"kind": "seq", "scale": "learned"}}')
    table = {"rules": [{"match": ".*", "weight": "q4_0"}], "estimator": SEQ}
    message = r"model\.embed: expected a grid that holds the levels of seq \(.*q2_k, .*mlx2_g32, .*got q4_0"
    with pytest.raises(libqat.ArgumentError, match=message):
        libqat.Policy.from_json(json.dumps(table)).estimators([("model.embed", "embedding", (4, 32))])
    floats = {"rules": [{"match": ".*", "weight": "bf16"}], "estimator": SEQ}
    libqat.Policy.from_json(json.dumps(floats)).estimators([("w", "linear", (4, 32))])  # has no scales
    assert libqat.recommended(policy).start == "guided"
    assert libqat.recommended(policy).policy == policy


def model_of(grid="mlx2_g32", width=64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20, width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 20, bias=False)
    )
    model[3].weight = model[0].weight
    policy = {"rules": [{"match": ".*", "weight": grid}], "estimator": SEQ}
    return model, libqat.prepare(model, policy)


@pytest.mark.parametrize("grid", ["mlx2_g32", "q2_k"])
def test_layers_train_the_free_parameters(grid):
    model, prepared = model_of(grid, 256)
    layer = model[1]
    assert layer.weight_quantizer.tied
    assert list(prepared.scale_parameters()) == ["0.weight_scales", "1.weight_scales"]
    assert model[0].weight_scales is model[3].weight_scales  # one latent, one set of parameters, two uses
    assert torch.equal(layer.weight_scales, ops.seq_start(layer.weight, grid))
    ids = torch.tensor([[1, 2, 3]])
    groups = libqat.parameter_groups(prepared, learning_rate=1e-2, scale_learning_rate=1e-2)
    assert [len(group["params"]) for group in groups] == [3, 1, 1]
    optimizer = torch.optim.Adam(groups)
    before = copy.deepcopy(prepared.scale_parameters())
    for _ in range(3):
        optimizer.zero_grad()
        (model(ids) - 1).square().sum().backward()
        optimizer.step()
    for name, free in prepared.scale_parameters().items():
        assert not torch.equal(free, before[name])
    x = normal(3, 256, seed=4)
    scales = ops.seq_tie(layer.weight_scales, grid)
    expected = ops.quantized_linear(x, layer.weight, layer.bias, grid, "clipped_ste", "learned", "w", scales)
    assert torch.equal(layer(x), expected)
    checkpoint = libqat.freeze(prepared)
    for key in checkpoint.quantized:
        assert torch.equal(checkpoint.weight(key), model[int(key[0])].fake_quantized().detach())
    by_name = {row.name: row for row in prepared.report()}
    wrong = (layer.fake_quantized() - layer.weight).square().mean() / layer.weight.square().mean()
    assert by_name["1.weight"].relative_error == pytest.approx(float(wrong.detach().sqrt()), rel=1e-5)
    other, _ = model_of(grid, 256)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))
    prepared.initialize_scales("reference")
    assert torch.equal(layer.weight_scales, ops.seq_start(layer.weight, grid, "reference"))


def test_blend_and_grids_that_cannot_hold_it():
    model, prepared = model_of()
    layer, x = model[1], normal(3, 64)
    quantized = layer(x).detach()
    as_float = nn.functional.linear(x, layer.weight, layer.bias).detach()
    layer.weight_quantizer.blend = 0.25
    # lerp rounds: 1e-6 is some steps of float32
    torch.testing.assert_close(layer(x), 0.75 * as_float + 0.25 * quantized, rtol=1e-6, atol=1e-6)
    layer.weight_quantizer.blend = 1.0
    former, shipped = layer.weight_scales, libqat.freeze(prepared).weight("1.weight")
    prepared.set_training_grid("mlx4_g32")  # holds SEQ, so it is SEQ there
    assert layer.weight_quantizer.tied
    assert torch.equal(layer.weight_scales, ops.seq_start(layer.weight, "mlx4_g32"))
    prepared.set_training_grid("q8_0")  # does not: learned scales
    assert not layer.weight_quantizer.tied
    assert torch.equal(layer.weight_scales, ops.choose_scales(layer.weight, "q8_0"))
    assert torch.equal(libqat.freeze(prepared).weight("1.weight"), shipped)
    prepared.set_training_grid("bf16")
    assert layer.weight_scales is None
    assert torch.equal(libqat.freeze(prepared).weight("1.weight"), shipped)
    prepared.set_training_grid("")
    assert torch.equal(layer.weight_scales, former)
    quantizer = WeightQuantizer("w", "mlx3_g64@fp16", "clipped_ste", "seq")
    assert quantizer.tied
    assert quantizer.learned
    assert quantizer.start(normal(2, 64)).shape == (2, 1, 1)
