"""What `prepare` refuses; each refusal leaves the model as it was."""

import pytest
import torch
from preparing import ALL_Q4
from torch import nn

import libqat


class Adapter(nn.Module):
    """Stands in for a PEFT layer."""


Adapter.__module__ = "peft.tuners.lora"


class OwnLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class FSDPModule:
    """Stands in for torch.distributed.fsdp.FSDPModule, which is mixed into sharded modules."""


class Sharded(FSDPModule, nn.Sequential):
    pass


class Reads(nn.Module):
    """Uses another layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.copy = self.layer.weight


REFUSED = {
    "peft": (lambda: nn.Sequential(nn.Linear(32, 32), Adapter()), "PEFT"),
    "fsdp": (lambda: Sharded(nn.Linear(32, 32)), "before fully_shard"),
    "subclass": (lambda: nn.Sequential(nn.Linear(32, 32), OwnLinear(32, 32)), r"1: .*OwnLinear.*subclass"),
    "attention": (lambda: nn.MultiheadAttention(32, 2), "NonDynamicallyQuantizableLinear"),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64)),
        "set_fastpath_enabled",
    ),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(8, 32, max_norm=1.0)), "max_norm"),
    "weight_norm": (lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(32, 32))), "computed"),
    "parametrized": (
        lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))),
        "ParametrizedLinear",
    ),
    "shared": (Reads, r"layer\.weight: is also the parameter copy"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_layers_that_would_not_use_the_weight(case):
    make, message = REFUSED[case]
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(libqat.UnsupportedError, match=message):
        libqat.prepare(model, ALL_Q4)
    assert [type(module) for module in model.modules()] == classes


def test_a_rule_can_leave_an_unknown_subclass_float():
    model = nn.Sequential(nn.Linear(32, 32), OwnLinear(32, 32))
    prepared = libqat.prepare(model, {"rules": [{"match": "1", "weight": "f32"}, *ALL_Q4["rules"]]})
    assert list(prepared.quantizers()) == ["0.weight"]
    assert type(model[1]) is OwnLinear


def test_refuses_float64():
    with pytest.raises(libqat.ArgumentError, match=r"0\.weight: .*float64"):
        libqat.prepare(nn.Sequential(nn.Linear(32, 32).double()), ALL_Q4)


def test_refuses_another_policy_and_accepts_the_same(llama):
    libqat.prepare(llama, "gguf-q4_0")
    assert len(libqat.prepare(llama, "gguf-q4_0").slots) == 15
    with pytest.raises(libqat.ArgumentError, match="unprepare"):
        libqat.prepare(llama, "gguf-q8_0")
    with pytest.raises(libqat.ArgumentError, match="unprepare"):
        libqat.prepare(nn.ModuleDict({"inner": llama}), "gguf-q4_0")
    libqat.unprepare(llama)
    assert libqat.prepare(llama, "gguf-q8_0").quantizers()["model.layers.0.mlp.up_proj.weight"].grid == "q8_0"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("gguf-q5", "gguf-q4_0"),
        ("no/such/policy.json", "no/such/policy.json"),
        ({"rules": [{"match": ".*", "weight": "q9_9"}]}, r"rules\[0\]\.weight"),
        ({"rules": [{"match": ".*", "wieght": "q4_0"}]}, r"wieght"),
        ({"rules": [{"match": "nowhere", "weight": "q4_0"}]}, r"nowhere"),
        ({"rules": [{"match": "0", "weight": "q4_0"}]}, r"0\.weight|0"),
    ],
)
def test_policy_errors_leave_the_model_alone(policy, message):
    model = nn.Sequential(nn.Linear(33, 32))
    with pytest.raises(libqat.Error, match=message):
        libqat.prepare(model, policy)
    assert type(model[0]) is nn.Linear
