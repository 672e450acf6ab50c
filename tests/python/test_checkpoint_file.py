"""The checkpoint's file as an independent reader sees it."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import libqat
from libqat import _core


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    tensors = [
        ("block", torch.randn(6, 64)),
        ("offset", torch.randn(6, 64)),
        ("channel", torch.randn(5, 3, 3, 3)),
        ("norm", torch.randn(64)),
    ]
    grids = {"block": "q4_0", "offset": "q4_1", "channel": "int2_channel"}
    checkpoint = _core.freeze_tensors(tensors, grids, config="{}")
    path = tmp_path / "x.qat.safetensors"
    libqat.save(checkpoint, path)
    return checkpoint, path


def bits(packed, width, count):
    """Codes of `width` bits, least significant bits first, as the header comment of pack.hpp says."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : count * width]
    return stream.reshape(len(packed), count, width) @ (1 << np.arange(width))


def test_numpy_decodes_the_file_to_the_weights(saved):
    checkpoint, path = saved
    with safe_open(path, "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata()
    assert set(tensors) == {
        *("block.codes", "block.scales", "offset.codes", "offset.scales", "offset.mins"),
        *("channel.codes", "channel.scales", "norm"),
    }
    table = json.loads(metadata["libqat.tensors"])
    assert table["channel"] == {"weight": "int2_channel", "shape": [5, 3, 3, 3]}

    scales = {key: np.float32(value) for key, value in tensors.items()}
    block = (bits(tensors["block.codes"], 4, 64) - 8).astype(np.float32)
    block = block.reshape(6, 2, 32) * scales["block.scales"][..., None]
    offset = bits(tensors["offset.codes"], 4, 64).astype(np.float32).reshape(6, 2, 32)
    offset = offset * scales["offset.scales"][..., None] + scales["offset.mins"][..., None]
    channel = (bits(tensors["channel.codes"], 2, 27) - 2).astype(np.float32) * scales["channel.scales"]
    for key, expected in (("block", block), ("offset", offset), ("channel", channel)):
        np.testing.assert_array_equal(
            checkpoint.weight(key).flatten(1).numpy(), expected.reshape(len(expected), -1)
        )
    np.testing.assert_array_equal(checkpoint.weight("norm").numpy(), tensors["norm"])


def test_the_parts_of_a_checkpoint_are_tensors(saved):
    checkpoint, path = saved
    loaded = libqat.load(path)
    assert list(loaded.quantized) == ["block", "channel", "offset"]
    assert list(loaded.floats) == ["norm"]
    for key, tensor in loaded.quantized.items():
        original = checkpoint.quantized[key]
        assert (tensor.grid, tensor.shape) == (original.grid, original.shape)
        assert torch.equal(tensor.codes, original.codes)
        assert torch.equal(tensor.scales, original.scales)
    assert loaded.quantized["offset"].scales.shape == (6, 2, 2)
    assert loaded.quantized["channel"].codes.shape == (5, 27)
    with pytest.raises(libqat.ArgumentError, match="other"):
        loaded.weight("other")


def test_an_ordinary_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(libqat.FileError, match=r"model\.safetensors: expected a libqat checkpoint"):
        libqat.load(tmp_path / "model.safetensors")


def test_bytes_do_not_depend_on_threads(tmp_path):
    torch.manual_seed(1)
    weight = torch.randn(256, 512)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        libqat.save(_core.freeze_tensors([("w", weight)], {"w": "q4_0"}), tmp_path / str(threads))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
