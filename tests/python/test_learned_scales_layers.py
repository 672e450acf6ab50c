"""Learned scales as parameters of layers: copies, optimizers, training."""

import copy
import io
import pickle

import pytest
import torch
from learned_scales import LSQ, normal
from torch import nn

import libqat
from libqat import ops


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
