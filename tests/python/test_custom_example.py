"""A network trained in Python goes on in C++: names and safetensors are all that the two share."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

PROGRAM = Path(__file__).resolve().parents[2] / "build" / "examples" / "finetune_custom"


class ConvNorm(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


class DigitNet(nn.Module):
    """The names of examples/digit_net.hpp."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNorm(1, 24, 3, 2)
        self.depthwise1 = ConvNorm(24, 24, 3, 1, 24)
        self.pointwise1 = ConvNorm(24, 48, 1, 1)
        self.depthwise2 = ConvNorm(48, 48, 3, 2, 48)
        self.pointwise2 = ConvNorm(48, 96, 1, 1)
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 10)


def run(weights, out):
    command = [PROGRAM, "--small", "--batch-norm", "freeze", "--weights", weights, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(autouse=True)
def program():
    if not PROGRAM.exists():
        pytest.skip(f"{PROGRAM} is not built")


def test_weights_saved_in_python_are_the_cpp_network_s(tmp_path):
    torch.manual_seed(0)
    state = DigitNet().state_dict()
    save_file(state, tmp_path / "python.safetensors")
    done = run(tmp_path / "python.safetensors", tmp_path / "out")
    assert "QAT from file" in done.stdout, done.stderr
    written = load_file(tmp_path / "out" / "float.safetensors")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(written[name], tensor), name


def test_another_network_s_weights_are_refused_name_by_name(tmp_path):
    state = DigitNet().state_dict()
    state["tail.weight"] = state.pop("head.weight").clone()
    save_file(state, tmp_path / "other.safetensors")
    done = run(tmp_path / "other.safetensors", tmp_path / "out")
    assert done.returncode == 2
    assert "head.weight: expected Float[10, 96], got none" in done.stderr
    assert "tail.weight: expected a tensor of the module" in done.stderr
