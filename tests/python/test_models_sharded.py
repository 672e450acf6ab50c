"""Models in several files: read as transformers wrote them, and refused when the shards disagree."""

import json
import re

import pytest
import torch
from command_line import fails, works
from conftest import make_llama
from safetensors.torch import load_file, save_file

import libqat

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, hf_folder):
    """The model of `hf_folder` in shards of 100 kB, with its tokenizer."""
    make_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((hf_folder / name).read_bytes())
    assert len(list(tmp_path.glob("model-0*.safetensors"))) == 4
    return tmp_path


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_shards_are_the_whole_model(folder, hf_folder):
    sharded, whole = (libqat.load_model(path).decoder.parameters() for path in (folder, hf_folder))
    assert sharded.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(sharded[name], weight), name


def test_the_command_line_reads_shards(folder, hf_folder, text_file, tmp_path):
    out = tmp_path / "rtn.qat.safetensors"
    works("quantize", folder, "--out", out)
    works("quantize", hf_folder, "--out", tmp_path / "whole.qat.safetensors")
    sharded, whole = libqat.load(out), libqat.load(tmp_path / "whole.qat.safetensors")
    for key, tensor in whole.quantized.items():
        assert torch.equal(sharded.quantized[key].codes, tensor.codes), key
    works(
        *("finetune", folder, "--text", text_file, "--out", tmp_path / "run"),
        *("--steps", 1, "--sequence-length", 16),
    )
    works("export", tmp_path / "run" / "model.qat.safetensors", tmp_path / "a.gguf")


def test_a_missing_shard_is_named(folder):
    name = sorted(set(weight_map(folder).values()))[2]
    (folder / name).unlink()
    with pytest.raises(libqat.FileError, match=re.escape(str(folder / name))):
        libqat.load_model(folder)
    fails("quantize", folder, says=[name, "No such file"])


def test_a_truncated_shard_is_named(folder):
    shard = folder / sorted(set(weight_map(folder).values()))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    fails("quantize", folder, says=str(shard))


def test_an_index_that_names_an_absent_tensor(folder):
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.absent.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    fails("quantize", folder, says=[shard, 'expected a tensor "model.absent.weight"'])


def test_a_tensor_in_two_shards(folder):
    shards = weight_map(folder)
    key = "model.norm.weight"
    other = next(name for name in sorted(shards.values()) if name != shards[key])
    tensors = load_file(folder / other)
    save_file(tensors | {key: torch.zeros(64)}, folder / other)
    fails("quantize", folder, says=[INDEX, f'expected "{key}" in one shard', other, shards[key]])


def test_a_tensor_that_the_index_forgot(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    fails("quantize", folder, says="missing model.layers.1.mlp.up_proj.weight")
