"""Hugging Face folders: transformers computes with the shipped numbers; the folder is whole or not there."""

import json
import os
import shutil

import pytest
import torch
from conftest import make_llama
from exporting import DTYPES, checkpoint_of, read_folder, some_tokens, with_dtypes
from safetensors.torch import load_file, save_file

import libqat
from libqat import _core

# ---- what transformers makes of it


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_what_the_prepared_model_computes(tmp_path, hf_folder, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_llama(tied=tied, initializer_range=0.1).eval()
    prepared = libqat.prepare(model, "gguf-q4_0")
    with torch.no_grad():
        expected = model(some_tokens()).logits
    checkpoint = libqat.freeze(prepared, tokenizer=hf_folder)
    libqat.export(checkpoint, tmp_path / "out", target="hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert loaded.config.tie_word_embeddings is tied
    with torch.no_grad():
        # The same float32 weights in the same layers; a quantized layer may order its sums differently.
        torch.testing.assert_close(loaded(some_tokens()).logits, expected, atol=1e-5, rtol=1e-5)
    assert ("lm_head.weight" in read_folder(tmp_path / "out")) is not tied
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    plain, written = (AutoTokenizer.from_pretrained(path) for path in (hf_folder, tmp_path / "out"))
    assert written("def f(x): return 1")["input_ids"] == plain("def f(x): return 1")["input_ids"]


@with_dtypes
def test_weights_are_the_dequantized_ones_rounded_once(tmp_path, dtype):
    checkpoint = checkpoint_of(make_llama())
    libqat.export(checkpoint, tmp_path / "out", target="hf", dtype=dtype)
    weights = _core.dequantize(checkpoint)
    del weights["lm_head.weight"]
    written = read_folder(tmp_path / "out")
    assert written.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.equal(written[key], weight.to(DTYPES[dtype])), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "_name_or_path" not in config


def test_libqat_loads_its_own_folders(tmp_path):
    checkpoint = checkpoint_of(make_llama(tied=False, attention_bias=True), grids={})
    libqat.export(checkpoint, tmp_path / "out", target="hf", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("model-*"))) > 3
    parameters = libqat.load_model(tmp_path / "out").decoder.parameters()
    for key, weight in _core.dequantize(checkpoint).items():
        assert torch.equal(parameters[key], weight), key


def test_any_model_of_transformers_can_be_written(tmp_path):
    from transformers import AutoModel, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertModel(config).eval()
    prepared = libqat.prepare(model, "int4-channel")
    with torch.no_grad():
        expected = model(some_tokens() % 100).last_hidden_state
    checkpoint = libqat.freeze(prepared, tokenizer="none")
    libqat.export(checkpoint, tmp_path / "out", target="hf")
    loaded = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(some_tokens() % 100).last_hidden_state, expected, atol=1e-5, rtol=1e-5
        )
    assert libqat.verify(tmp_path / "out", checkpoint) == []


# ---- the narrowest dtype


def test_the_narrowest_dtype_that_is_exact_is_chosen(tmp_path):
    def dtype_of(checkpoint):
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        libqat.export(checkpoint, folder, target="hf")
        assert json.loads((folder / "libqat.json").read_text())["exact"] is True
        return json.loads((folder / "config.json").read_text())["dtype"]

    for name, dtype in DTYPES.items():
        model = make_llama()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        assert dtype_of(checkpoint_of(model, grid="f32", embedding="f32")) == name
    model = make_llama()
    # Codes of 4 bits times scales of 11 bits: 15 significant bits, more than float16 has.
    assert dtype_of(checkpoint_of(model)) == "float32"
    model.model.norm.weight.data[0] = 1 + 2**-20
    assert dtype_of(checkpoint_of(model, grid="bf16", embedding="bf16")) == "float32"


def test_weights_beyond_float16_are_refused(tmp_path):
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[5, 3] = 70000.0
    checkpoint = checkpoint_of(model, grid="int8_channel", embedding="f32")
    with pytest.raises(libqat.NumericError, match=r"layers\.1\.mlp\.up_proj\.weight: row 5: .*float16"):
        libqat.requantization_report(checkpoint, "float16")
    with pytest.raises(libqat.NumericError, match="float16"):
        libqat.export(checkpoint, tmp_path / "out", target="hf", dtype="float16")
    plain = checkpoint_of(model, grid="f32", embedding="f32")
    with pytest.raises(libqat.NumericError, match=r"layers\.1\.mlp\.up_proj\.weight: .*float16"):
        libqat.export(plain, tmp_path / "out", target="hf", dtype="float16")
    assert os.listdir(tmp_path) == []


# ---- the folder


def test_shards_are_those_of_transformers(tmp_path):
    model = make_llama(tied=False)
    libqat.export(
        checkpoint_of(model), tmp_path / "out", target="hf", dtype="float32", max_shard_size="100KB"
    )
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / name)
        assert {key for key, shard in index["weight_map"].items() if shard == name} == tensors.keys()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000


@pytest.mark.parametrize("size", ["", "0", "-1", "5 XB", "GB", 0, "1.5GB"])
def test_bad_shard_sizes(tmp_path, size):
    with pytest.raises(libqat.ArgumentError, match="max_shard_size: expected bytes"):
        libqat.export(checkpoint_of(make_llama()), tmp_path / "out", target="hf", max_shard_size=size)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path, hf_folder):
    contents = []
    for name in ("a", "b"):
        checkpoint = checkpoint_of(make_llama(), tokenizer=hf_folder)
        libqat.export(checkpoint, tmp_path / name, target="hf")
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    written = {"config.json", "model.safetensors", "README.md", "libqat.json"}
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert contents[0].keys() == written | copied
    for name in copied:
        assert contents[0][name] == (hf_folder / name).read_bytes()


def test_what_stands_in_the_way(tmp_path):
    checkpoint = checkpoint_of(make_llama())

    def export(**options):
        libqat.export(checkpoint, tmp_path / "out", target="hf", **options)

    (tmp_path / "out").write_text("a file")
    with pytest.raises(libqat.FileError, match="got a file"):
        export(overwrite=True)
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    export()  # an empty folder is no obstacle
    with pytest.raises(libqat.FileError, match=r"an earlier export .*--overwrite"):
        export()
    export(overwrite=True, dtype="bfloat16", max_shard_size="50KB")
    export(overwrite=True)
    assert not list((tmp_path / "out").glob("model-*"))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(libqat.FileError, match=r"another file in it, notes\.txt"):
        export(overwrite=True)
    (tmp_path / "out" / "libqat.json").unlink()
    with pytest.raises(libqat.FileError, match="a folder with other files"):
        export(overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_progress_reaches_the_end(tmp_path):
    calls = []
    libqat.export(
        checkpoint_of(make_llama()),
        tmp_path / "out",
        target="hf",
        progress=lambda *call: calls.append(call),
    )
    assert calls == sorted(calls)
    assert (
        calls[-1][0]
        == calls[-1][1]
        == sum(tensor.nbytes for tensor in read_folder(tmp_path / "out").values())
    )


def test_errors_name_what_is_wrong(tmp_path, hf_folder):
    checkpoint = checkpoint_of(make_llama())
    for options, message in [
        ({"dtype": "float64"}, "dtype: expected bfloat16, float16 or float32"),
        ({"target": "gguf", "dtype": "float32"}, "dtype: expected it with the targets .*hf.* only"),
        ({"target": "gguf", "overwrite": True}, "overwrite: expected it with"),
        ({"target": "gguf", "require_exact": True}, "require_exact: expected it with"),
        ({"target": "gguf", "max_shard_size": 5}, "max_shard_bytes: expected it with"),
    ]:
        with pytest.raises(libqat.ArgumentError, match=message):
            libqat.export(checkpoint, tmp_path / "out", **({"target": "hf"} | options))
    with pytest.raises(libqat.ArgumentError, match="--tokenizer-from"):
        libqat.export(checkpoint_of(make_llama(), tokenizer=""), tmp_path / "out", target="hf")
    with pytest.raises(libqat.FileError, match="absent"):
        libqat.export(checkpoint, tmp_path / "out", target="hf", tokenizer_from=tmp_path / "absent")
    with pytest.raises(libqat.FileError, match="absent"):
        libqat.export(checkpoint, tmp_path / "absent" / "out", target="hf")
    no_config = _core.freeze_tensors([("weight", torch.ones(2, 32))], {"weight": "q4_0"}, tokenizer="none")
    with pytest.raises(libqat.ArgumentError, match="config: expected the model's configuration"):
        libqat.export(no_config, tmp_path / "out", target="hf")
    assert os.listdir(tmp_path) == []


# ---- verify


def test_verify_tells_rounding_from_other_numbers(tmp_path):
    checkpoint = checkpoint_of(make_llama())
    folder = tmp_path / "out"
    libqat.export(checkpoint, folder, target="hf", dtype="bfloat16")
    rounded = {
        row.tensor: row.rounded_weights for row in libqat.requantization_report(checkpoint, "bfloat16")
    }
    differences = libqat.verify(folder, checkpoint)
    assert {d.tensor: d.count for d in differences} == {key: count for key, count in rounded.items() if count}
    assert {d.what for d in differences} == {"rounded"}

    shutil.rmtree(folder)
    libqat.export(checkpoint, folder, target="hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 2.0
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] *= -1
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"][:4]
    tensors["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(128, 64, dtype=torch.int32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["surplus"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    found = {(d.tensor, d.what, d.count) for d in libqat.verify(folder, checkpoint)}
    assert found == {
        ("config.json", "metadata", 1),
        ("model.norm.weight", "values", 1),
        ("model.layers.0.mlp.up_proj.weight", "values", 1),
        ("model.layers.0.mlp.gate_proj.weight", "shape", 1),
        ("model.layers.1.mlp.gate_proj.weight", "type", 1),
        ("model.layers.1.mlp.up_proj.weight", "missing", 1),
        ("surplus", "extra", 1),
    }
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(libqat.FileError, match=r"model\.safetensors"):
        libqat.verify(folder, checkpoint)
