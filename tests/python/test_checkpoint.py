import pytest
import torch
from conftest import make_llama
from exporting import checkpoint_of

import libqat
from libqat import _core


def test_a_checkpoint_comes_back_from_its_file(tmp_path):
    checkpoint = _core.freeze_tensors(
        [("a.weight", torch.randn(4, 32)), ("b.bias", torch.randn(4).bfloat16()), ("c.ids", torch.arange(3))],
        {"a.weight": "q4_0"},
        config='{"a": 1}',
        tokenizer="t.json",
        policy='{"rules": []}',
    )
    libqat.save(checkpoint, tmp_path / "a.qat.safetensors")
    loaded = libqat.load(tmp_path / "a.qat.safetensors")
    assert loaded.grids == {"a.weight": "q4_0"}
    assert (loaded.config, loaded.tokenizer, loaded.policy) == ('{"a": 1}', "t.json", '{"rules": []}')
    expected, got = libqat.dequantize(checkpoint), libqat.dequantize(loaded)
    assert expected.keys() == got.keys() == {"a.weight", "b.bias", "c.ids"}
    for key, value in expected.items():
        assert torch.equal(value, got[key])
    libqat.save(loaded, tmp_path / "b.qat.safetensors")
    assert (tmp_path / "a.qat.safetensors").read_bytes() == (tmp_path / "b.qat.safetensors").read_bytes()


def test_dequantized_weights_are_those_of_the_operator():
    weight = torch.randn(8, 64)
    checkpoint = _core.freeze_tensors([("w", weight)], {"w": "q4_1"})
    assert torch.equal(libqat.dequantize(checkpoint)["w"], torch.ops.libqat.fake_quantize(weight, "q4_1"))


def test_one_tensor_of_two_names_is_stored_once():
    checkpoint = checkpoint_of(make_llama(tied=True))
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert checkpoint.grids["model.embed_tokens.weight"] == "q8_0"
    assert "lm_head.weight" not in checkpoint.grids
    weights = libqat.dequantize(checkpoint)
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert checkpoint_of(make_llama(tied=False)).aliases == {}


def test_views_that_read_the_memory_otherwise_are_no_aliases():
    weight = torch.randn(32, 32)
    tensors = [
        ("a", weight),
        ("transposed", weight.t()),
        ("flat", weight.view(-1)),
        ("again", weight.view(32, 32)),
    ]
    checkpoint = _core.freeze_tensors(tensors, {"a": "q4_0"})
    assert checkpoint.aliases == {"again": "a"}
    assert torch.equal(libqat.dequantize(checkpoint)["transposed"], weight.t())
    empty = _core.freeze_tensors([("a", torch.empty(0)), ("b", torch.empty(0))], {})
    assert empty.aliases == {}


def test_errors_name_tensor_and_file(tmp_path):
    with pytest.raises(libqat.ArgumentError, match=r"w\b"):
        _core.freeze_tensors([("w", torch.randn(4, 33))], {"w": "q4_0"})
    with pytest.raises(libqat.NumericError, match="w"):
        _core.freeze_tensors([("w", torch.full((1, 32), float("nan")))], {"w": "q4_0"})
    with pytest.raises(libqat.FileError, match="absent"):
        libqat.load(tmp_path / "absent")
    (tmp_path / "bad").write_bytes(b"bad")
    with pytest.raises(libqat.FileError, match="bad"):
        libqat.load(tmp_path / "bad")
