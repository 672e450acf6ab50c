"""`fold_batch_norms` finds the pairs of a model and proves them."""

import copy

import pytest
import torch
from batch_norms import block, settle
from torch import nn

import libqat


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
