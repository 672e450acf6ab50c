"""BatchNorm under training: frozen statistics, and folded networks on their grids."""

import copy
import pickle

import pytest
import torch
from batch_norms import block, settle
from torch import nn
from torch.nn import functional as F

import libqat

# ---- freezing


def small():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), settle(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(36, 4), nn.LayerNorm(4)
    )


def test_freezing_survives_train_and_trains_the_gains():
    model = small()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    assert libqat.freeze_batch_norm(model) == 1
    assert libqat.freeze_batch_norm(model) == 1
    model.train()
    assert model.training
    assert model[4].training
    input = torch.randn(8, 3, 5, 5)
    output = model(input)
    assert torch.equal(output, copy.deepcopy(model).eval()(input))
    output.square().sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    assert model[1].bias.grad.abs().sum() > 0
    assert torch.equal(model[1].running_mean, state["1.running_mean"])
    assert torch.equal(model[1].running_var, state["1.running_var"])
    assert list(model.state_dict()) == keys
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
    assert type(model[4]) is nn.LayerNorm


def test_freezing_late_keeps_the_statistics_learned_under_rounding():
    model = small()
    prepared = libqat.prepare(model, "int4-channel")
    model.train()
    before = model[1].running_mean.clone()
    model(torch.randn(8, 3, 5, 5))
    learned = model[1].running_mean.clone()
    assert not torch.equal(learned, before)
    assert libqat.freeze_batch_norm(prepared) == 1
    model.train()
    model(torch.randn(8, 3, 5, 5))
    assert torch.equal(model[1].running_mean, learned)
    assert dict(libqat.dequantize(libqat.freeze(prepared)))["1.running_mean"].equal(learned)


def test_frozen_models_copy_and_pickle():
    model = small()
    libqat.freeze_batch_norm(model)
    input = torch.randn(2, 3, 5, 5)
    expected = model(input)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.train()(input), expected)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, track_running_stats=False), type("Own", (nn.BatchNorm2d,), {})(4)]
)
def test_refuses_to_freeze(norm):
    model = nn.Sequential(nn.BatchNorm2d(3), norm)
    with pytest.raises(libqat.ArgumentError, match="1: expected a BatchNorm with running statistics"):
        libqat.freeze_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d


# ---- with prepare


def test_depthwise_rows_are_channels():
    """A depthwise weight is [C, 1, k, k]: each channel's k * k weights share one scale."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8))
    with torch.no_grad():
        model[0].weight.mul_(2.0 ** torch.arange(8).view(-1, 1, 1, 1))  # channels of very different size
    latent = model[0].weight.detach().clone()
    prepared = libqat.prepare(model, "int4-channel")
    largest = latent.abs().amax((1, 2, 3), keepdim=True)
    codes = (latent / (largest / 7.5)).clamp(-8, 7).round()
    expected = codes * (largest / 7.5)
    shipped = dict(libqat.dequantize(libqat.freeze(prepared)))["0.weight"]
    assert torch.equal(shipped, expected)
    input = torch.randn(2, 8, 6, 6)
    reference = F.conv2d(input, expected, model[0].bias, padding=2, groups=8)
    assert torch.equal(model(input), reference)
    row = prepared.report()[0]
    assert (row.kind, row.bytes) == ("conv", 8 * (13 + 4))  # 25 codes of 4 bits in whole bytes, one float32


def test_fold_prepare_freeze_and_back_into_a_float_model():
    """What the guide does: the float model that loads the checkpoint computes what training saw."""
    model = block().float()
    shell = copy.deepcopy(model)
    input = torch.randn(3, 4, 5, 5)
    libqat.fold_batch_norms(model, input)
    prepared = libqat.prepare(
        model,
        {
            "rules": [
                {"match": "depthwise|head", "weight": "int8_channel"},
                {"match": ".*", "kind": "conv", "weight": "int4_channel"},
            ]
        },
    )
    model.eval()
    expected = model(input)
    libqat.fold_batch_norms(shell, input)
    shell.load_state_dict(dict(libqat.dequantize(libqat.freeze(prepared))))
    assert torch.equal(shell.eval()(input), expected)
