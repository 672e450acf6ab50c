"""`fold_batch_norm`: one BatchNorm goes into the layer before it."""

import copy

import pytest
import torch
from batch_norms import settle
from torch import nn

import libqat
from libqat import ops

PAIRS = {
    "linear": (lambda: (nn.Linear(5, 6), nn.BatchNorm1d(6)), (4, 5)),
    "linear, no bias": (lambda: (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)), (4, 5)),
    "conv1d": (lambda: (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (2, 3, 9)),
    "conv2d": (lambda: (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-3)), (2, 3, 7, 7)),
    "conv2d with bias": (lambda: (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)), (2, 3, 7, 7)),
    "depthwise": (
        lambda: (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)),
        (2, 6, 7, 7),
    ),
    "conv3d": (lambda: (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (2, 2, 4, 4, 4)),
    "no affine": (lambda: (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 3, 7, 7)),
    "transposed": (lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed, groups": (
        lambda: (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6)),
        (2, 4, 5),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_folding_keeps_the_output(name):
    torch.manual_seed(1)
    make, shape = PAIRS[name]
    layer, norm = make()
    model = nn.Sequential(layer, settle(norm)).double().eval()
    weight = layer.weight
    input = torch.randn(shape, dtype=torch.float64)
    expected = model(input)
    libqat.fold_batch_norm(layer, norm)
    # the same real numbers in float64, in another order: about 20 rounding errors of 1e-16 on values near 5
    torch.testing.assert_close(model(input), expected, rtol=1e-13, atol=1e-13)
    assert type(norm) is nn.Identity
    assert layer.weight is weight
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.bias.requires_grad


def test_folded_float32_weights_are_rounded_once():
    torch.manual_seed(2)
    layer, norm = nn.Conv2d(3, 6, 3), settle(nn.BatchNorm2d(6))
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = layer.weight.double() * scale.view(-1, 1, 1, 1)
    bias = (layer.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    libqat.fold_batch_norm(layer, norm)
    # float64 differs in its last bits between x / sqrt(v) and x * rsqrt(v): at most one float32 unit then
    torch.testing.assert_close(layer.weight, weight.float(), rtol=2**-23, atol=0)
    torch.testing.assert_close(layer.bias, bias.float(), rtol=2**-23, atol=0)


def test_a_frozen_weight_gets_a_frozen_bias():
    layer = nn.Conv2d(3, 4, 1, bias=False).requires_grad_(False)
    libqat.fold_batch_norm(layer, settle(nn.BatchNorm2d(4)))
    assert not layer.bias.requires_grad


def test_a_folded_row_keeps_its_codes():
    """A positive gain scales a row and its scale alike: folding before `prepare` costs nothing."""
    torch.manual_seed(3)
    layer, norm = nn.Conv2d(16, 8, 3, bias=False), settle(nn.BatchNorm2d(8))
    with torch.no_grad():
        # powers of two, so that the products are exact and no code can tip
        norm.weight.copy_(2.0 ** torch.arange(-4, 4))
        norm.running_var.fill_(1.0)
        norm.eps = 0.0
    before, _ = ops.quantize(layer.weight.detach(), "int4_channel")
    libqat.fold_batch_norm(layer, norm)
    after, _ = ops.quantize(layer.weight.detach(), "int4_channel")
    assert torch.equal(before, after)


class Hooked(nn.Conv2d):
    pass


def with_hook():
    layer = nn.Conv2d(3, 4, 1)
    layer.register_forward_hook(lambda *_: None)
    return layer


def prepared():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    libqat.prepare(model, "int4-channel")
    return model[0]


REFUSED = {
    "prepared": (prepared, lambda: nn.BatchNorm2d(4), "not prepared.*unprepare"),
    "subclass": (lambda: Hooked(3, 4, 1), lambda: nn.BatchNorm2d(4), "got Hooked"),
    "other layer": (lambda: nn.ReLU(), lambda: nn.BatchNorm2d(4), "got ReLU"),
    "embedding": (lambda: nn.Embedding(3, 4), lambda: nn.BatchNorm2d(4), "got Embedding"),
    "layer norm": (lambda: nn.Linear(3, 4), lambda: nn.LayerNorm(4), "got LayerNorm"),
    "no statistics": (
        lambda: nn.Conv2d(3, 4, 1),
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        "running statistics",
    ),
    "channels": (lambda: nn.Conv2d(3, 4, 1), lambda: nn.BatchNorm2d(5), "of 4 channels, got one of 5"),
    "hook": (with_hook, lambda: nn.BatchNorm2d(4), "hooks"),
    "weight norm": (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)),
        lambda: nn.BatchNorm2d(4),
        "Parametrized",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_to_fold(name):
    make_layer, make_norm, message = REFUSED[name]
    layer, norm = make_layer(), make_norm()
    before = copy.deepcopy([*layer.state_dict().items(), *norm.state_dict().items()])
    with pytest.raises(libqat.ArgumentError, match=message):
        libqat.fold_batch_norm(layer, norm)
    after = [*layer.state_dict().items(), *norm.state_dict().items()]
    assert [key for key, _ in before] == [key for key, _ in after]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(before, after, strict=True))


def test_refuses_numbers_that_overflow():
    layer, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    norm.running_var.zero_()
    norm.eps = 0.0
    weight = layer.weight.detach().clone()
    with pytest.raises(libqat.NumericError, match="finite"):
        libqat.fold_batch_norm(layer, norm)
    assert torch.equal(layer.weight, weight)
    assert type(norm) is nn.BatchNorm2d
