import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libqat
from libqat import ops


def settle(norm, seed=0):
    """Statistics and parameters as training leaves them: no channel like another, some gains negative."""
    generator = torch.Generator().manual_seed(seed)
    channels = norm.num_features
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(channels, generator=generator))
        norm.running_var.copy_(torch.rand(channels, generator=generator) * 3 + 0.01)
        if norm.affine:
            norm.weight.copy_(torch.randn(channels, generator=generator))
            norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


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


# ---- finding pairs


class Block(nn.Module):
    """Expand, depthwise, project with a skip, then a classifier: the shape of a mobile network."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm0 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project, self.norm2 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm(4)
        self.head, self.norm3 = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        y = F.relu6(self.norm0(self.expand(x)))
        y = F.relu6(self.norm1(self.depthwise(y)))
        x = x + self.norm2(self.project(y))
        return self.norm3(self.head(self.layer_norm(x.mean((2, 3)))))


def block():
    torch.manual_seed(4)
    model = Block().double()
    for seed, norm in enumerate((model.norm0, model.norm1, model.norm2, model.norm3)):
        settle(norm, seed)
    return model


def test_finds_and_folds_the_pairs():
    model = block()
    model.norm0.eval()  # a mixed state must survive the tracing
    input = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(model).eval()(input)
    training = {name: module.training for name, module in model.named_modules()}
    result = libqat.fold_batch_norms(model, input)
    assert result.folded == [
        ("expand", "norm0"),
        ("depthwise", "norm1"),
        ("project", "norm2"),
        ("head", "norm3"),
    ]
    assert result.kept == {}
    assert {name: module.training for name, module in model.named_modules()} == training
    assert type(model.layer_norm) is nn.LayerNorm
    # the same real numbers in float64, in another order: rounding errors of 1e-16 through four layers
    torch.testing.assert_close(model.eval()(input), expected, rtol=1e-12, atol=1e-12)


def test_without_inputs_the_rank_before_batch_norm_1d_is_unknown():
    model = block()
    result = libqat.fold_batch_norms(model)
    assert [norm for _, norm in result.folded] == ["norm0", "norm1", "norm2"]
    assert "pass example inputs" in result.kept["norm3"]
    assert type(model.norm3) is nn.BatchNorm1d


def test_a_linear_over_positions_is_not_folded():
    """[N, L, O] meets BatchNorm1d(L): with L == O folding would silently normalize the wrong dimension."""
    model = nn.Sequential(nn.Linear(3, 4), settle(nn.BatchNorm1d(4)))
    result = libqat.fold_batch_norms(model, torch.randn(2, 4, 3))
    assert result.folded == []
    assert "3 dimensions" in result.kept["1"]
    assert libqat.fold_batch_norms(model, torch.randn(2, 3)).folded == [("0", "1")]


class Wired(nn.Module):
    """conv and norm, called by the function given."""

    def __init__(self, call):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), settle(nn.BatchNorm2d(3))
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def training_reads(self, x):
    y = self.conv(x)
    return self.norm(y) + y if self.training else self.norm(y)


UNPROVEN = {
    "output read twice": (lambda self, x: self.norm(y := self.conv(x)) + y, "read by 2"),
    "output read in training only": (training_reads, "read by 2"),
    "layer called twice": (lambda self, x: self.norm(self.conv(self.conv(x))), "more than once"),
    "norm called twice": (lambda self, x: self.norm(self.norm(self.conv(x))), "calls it 2 times"),
    "something between": (lambda self, x: self.norm(self.conv(x) * 2), "not a layer"),
    "weight read": (
        lambda self, x: self.norm(self.conv(x)) * self.conv.weight.sum(),
        "conv.weight: forward reads it",
    ),
    "not called": (lambda self, x: self.conv(x), "calls it 0 times"),
    "control flow": (lambda self, x: self.norm(self.conv(x if x.sum() > 0 else -x)), "cannot trace"),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_leaves_what_it_cannot_prove(name):
    call, reason = UNPROVEN[name]
    model = Wired(call).train()
    state = copy.deepcopy(model.state_dict())
    result = libqat.fold_batch_norms(model)
    assert result.folded == []
    assert reason in result.kept["norm"]
    assert model.training
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_leaves_shared_parameters():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm2d(3), second)
    assert libqat.fold_batch_norms(model).kept == {"1": "2: shares a parameter with it"}


def test_leaves_layers_that_are_no_layers():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    result = libqat.fold_batch_norms(model)
    assert result.folded == []
    assert "got ReLU" in result.kept["2"]


def test_refuses_a_prepared_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    libqat.prepare(model, "int4-channel")
    with pytest.raises(libqat.ArgumentError, match=r"not prepared.*unprepare"):
        libqat.fold_batch_norms(model)
    assert libqat.fold_batch_norms(libqat.unprepare(model)).folded == [("0", "1")]


def test_folds_frozen_batch_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), settle(nn.BatchNorm2d(4)))
    libqat.freeze_batch_norm(model)
    assert libqat.fold_batch_norms(model).folded == [("0", "1")]


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
