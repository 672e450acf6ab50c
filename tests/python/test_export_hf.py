"""Hugging Face folders: transformers computes with the shipped numbers, and what requantizing them gives."""

import ctypes
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama
from exporting import checkpoint_of
from safetensors.torch import load_file, save_file
from test_cli import fails, works

import libqat
from libqat import _core

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
with_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def tokens():
    return torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(1))


def read(folder):
    """Every tensor of the folder's safetensors."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


# ---- what transformers makes of it


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_what_the_prepared_model_computes(tmp_path, hf_folder, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_llama(tied=tied, initializer_range=0.1).eval()
    prepared = libqat.prepare(model, "gguf-q4_0")
    with torch.no_grad():
        expected = model(tokens()).logits
    checkpoint = libqat.freeze(prepared, tokenizer=hf_folder)
    libqat.export(checkpoint, tmp_path / "out", target="hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert loaded.config.tie_word_embeddings is tied
    with torch.no_grad():
        # The same float32 weights in the same layers; a quantized layer may order its sums differently.
        torch.testing.assert_close(loaded(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
    assert ("lm_head.weight" in read(tmp_path / "out")) is not tied
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    plain, written = (AutoTokenizer.from_pretrained(path) for path in (hf_folder, tmp_path / "out"))
    assert written("def f(x): return 1")["input_ids"] == plain("def f(x): return 1")["input_ids"]


@with_dtypes
def test_weights_are_the_dequantized_ones_rounded_once(tmp_path, dtype):
    checkpoint = checkpoint_of(make_llama())
    libqat.export(checkpoint, tmp_path / "out", target="hf", dtype=dtype)
    weights = _core.dequantize(checkpoint)
    del weights["lm_head.weight"]
    written = read(tmp_path / "out")
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
        expected = model(tokens() % 100).last_hidden_state
    checkpoint = libqat.freeze(prepared, tokenizer="none")
    libqat.export(checkpoint, tmp_path / "out", target="hf")
    loaded = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens() % 100).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
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


# ---- requantization


def ggml_quantize(weights, grid):
    """ggml's own blocks of a float32 matrix, [blocks, bytes]."""
    package = pytest.importorskip("libggml", reason="needs libggml-python: pip install libggml-python")
    library = ctypes.CDLL(str(Path(package.__file__).parent / "lib64" / "libggml-base.so"))
    quantize = getattr(library, f"quantize_row_{grid}_ref")
    quantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.ascontiguousarray(weights, np.float32)
    blocks = np.empty((values.size // 32, {"q4_0": 18, "q4_1": 20, "q8_0": 34}[grid]), np.uint8)
    quantize(values.ctypes.data, blocks.ctypes.data, values.size)
    return blocks


def shipped_blocks(checkpoint, folder):
    """What the GGUF of the checkpoint holds, in the row order of training."""
    import gguf
    from exporting import hf_name, rows_as_trained

    libqat.export(checkpoint, folder / "a.gguf")
    blocks = {}
    for tensor in gguf.GGUFReader(folder / "a.gguf").tensors:
        rows = np.array(tensor.data)
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])
        blocks[hf_name(tensor.name)] = rows_as_trained(rows, heads) if heads else rows
    return blocks


def spoil(checkpoint):
    """Takes the code -8 from some blocks and gives others a scale that is not their rule's."""
    key = "model.layers.0.mlp.up_proj.weight"
    checkpoint.quantized[key].codes[::3].clamp_(min=-7)
    checkpoint.quantized["model.layers.1.mlp.up_proj.weight"].scales[5:9].mul_(2)


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("spoiled", [False, True])
@with_dtypes
def test_the_report_counts_the_blocks_that_ggml_would_change(tmp_path, grid, spoiled, dtype):
    checkpoint = checkpoint_of(make_llama(), grid=grid, embedding=grid)
    if spoiled and grid == "q4_0":
        spoil(checkpoint)
    shipped = shipped_blocks(checkpoint, tmp_path)
    libqat.export(checkpoint, tmp_path / "out", target="hf", dtype=dtype)
    written = read(tmp_path / "out")
    report = libqat.requantization_report(checkpoint, dtype)
    assert [row.tensor for row in report] == sorted(checkpoint.quantized)
    for row in report:
        blocks = ggml_quantize(written[row.tensor].float().numpy(), grid)
        ours = shipped[row.tensor].reshape(blocks.shape)
        assert row.changed_blocks == int((blocks != ours).any(1).sum()), row.tensor
        assert row.blocks == len(blocks)
        exact = _core.dequantize(checkpoint)[row.tensor]
        assert row.rounded_weights == int((exact.to(DTYPES[dtype]).float() != exact).sum())
    if not spoiled and grid == "q4_0" and dtype != "bfloat16":
        assert all(row.exact for row in report)
    if spoiled and grid == "q4_0":
        changed = {row.tensor: row.changed_blocks for row in report if not row.exact}
        assert (
            changed["model.layers.0.mlp.up_proj.weight"] >= 43 * 2 * 0.9
        )  # every third row of 128, 2 blocks
    if grid == "q4_0" and dtype == "bfloat16":
        # A scale of 11 bits is one of 8 bits once in eight times.
        assert 0.8 < sum(r.changed_blocks for r in report) / sum(r.blocks for r in report) < 0.95


@pytest.mark.parametrize(("grid", "bits"), [("int8_channel", 8), ("int4_channel", 4), ("int2_channel", 2)])
def test_channel_grids_against_their_formula(grid, bits):
    checkpoint = checkpoint_of(make_llama(), grid=grid, embedding="f32")
    for row in libqat.requantization_report(checkpoint):
        codes, scales = (getattr(checkpoint.quantized[row.tensor], name) for name in ("codes", "scales"))
        weights = codes.float() * scales[:, :, 0]
        again = weights.abs().amax(1) / ((2**bits - 1) / 2)
        quotient = (weights / again[:, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        changed = (again != scales[:, 0, 0]) | (quotient != codes).any(1)
        assert row.changed_blocks == int(changed.sum())
        assert row.blocks == len(codes)
        # The rule wants the greatest weight at (2^bits - 1) / 2 scales, which is no code.
        assert row.changed_blocks == row.blocks


def test_exactness_can_be_required(tmp_path):
    checkpoint = checkpoint_of(make_llama())
    libqat.export(checkpoint, tmp_path / "good", target="hf", require_exact=True)
    manifest = json.loads((tmp_path / "good" / "libqat.json").read_text())
    assert manifest["requantizes_exactly"] is True
    assert "were trained: exact." in (tmp_path / "good" / "README.md").read_text()
    spoil(checkpoint)
    with pytest.raises(libqat.UnsupportedError) as caught:
        libqat.export(checkpoint, tmp_path / "bad", target="hf", require_exact=True)
    message = str(caught.value)
    assert "model.layers.0.mlp.up_proj.weight (" in message
    assert "model.layers.1.mlp.up_proj.weight" not in message, "a doubled scale is still its block's own"
    assert os.listdir(tmp_path) == ["good"]
    libqat.export(checkpoint, tmp_path / "bad", target="hf")
    manifest = json.loads((tmp_path / "bad" / "libqat.json").read_text())
    assert (manifest["exact"], manifest["requantizes_exactly"]) == (True, False)
    [changed] = [key for key, row in manifest["tensors"].items() if row["changed_blocks"]]
    assert changed == "model.layers.0.mlp.up_proj.weight"
    header = _core.read_safetensors_header(tmp_path / "bad" / "model.safetensors")["metadata"]
    assert header["format"] == "pt"
    assert header["libqat.requantization"].endswith("blocks change, in 1 of 15 tensors")


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


def test_an_interrupted_export_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        libqat.export(checkpoint_of(make_llama()), tmp_path / "out", target="hf", progress=interrupt)
    assert os.listdir(tmp_path) == []
    checkpoint = checkpoint_of(make_llama())
    libqat.export(checkpoint, tmp_path / "out", target="hf")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        libqat.export(checkpoint, tmp_path / "out", target="hf", overwrite=True, progress=interrupt)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


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
    assert calls[-1][0] == calls[-1][1] == sum(tensor.nbytes for tensor in read(tmp_path / "out").values())


def test_errors_name_what_is_wrong(tmp_path, hf_folder):
    checkpoint = checkpoint_of(make_llama())
    for options, message in [
        ({"dtype": "float64"}, "dtype: expected bfloat16, float16 or float32"),
        ({"target": "gguf", "dtype": "float32"}, 'dtype: expected it with the target "hf" only'),
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


# ---- the command line, from a model with an untied head to each consumer


@pytest.fixture(scope="module")
def untied_run(tmp_path_factory, hf_folder, text_file):
    """An untied model with biases and llama3 positions, fine-tuned for two steps by the command line."""
    folder = tmp_path_factory.mktemp("untied")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    settings = {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope}
    shutil.copytree(hf_folder, folder / "model")
    model = make_llama(tied=False, initializer_range=0.1, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1, 1)
    model.save_pretrained(folder / "model")
    works(
        *("finetune", folder / "model", "--text", text_file, "--out", folder / "run"),
        *("--steps", 2, "--sequence-length", 16),
    )
    return folder


def test_an_untied_head_is_trained_frozen_and_exported(untied_run, tmp_path):
    path = untied_run / "run" / "model.qat.safetensors"
    checkpoint = libqat.load(path)
    assert checkpoint.grids["lm_head.weight"] == "q8_0"
    assert checkpoint.aliases == {}
    before = libqat.load_model(untied_run / "model").decoder.parameters()
    moved = {key for key, weight in checkpoint.floats.items() if not torch.equal(weight, before[key])}
    assert "model.layers.0.self_attn.q_proj.bias" in moved
    works("export", path, tmp_path / "a.gguf")
    works("verify", tmp_path / "a.gguf", "--against", path)
    out = works("export", path, tmp_path / "hf", "--target", "hf", "--max-shard-size", "100KB")
    assert "float32 weights, exactly as trained" in out
    works("verify", tmp_path / "hf", "--against", path)

    decoders = [
        libqat.load_checkpoint(path).decoder,
        libqat.load_model(tmp_path / "a.gguf").decoder,
        libqat.load_model(tmp_path / "hf").decoder,
    ]
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        ours, from_gguf, from_folder = (decoder(tokens()) for decoder in decoders)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens()).logits
    assert torch.equal(ours, from_folder)
    # The GGUF's configuration went through float32 and its rope parameters were found again.
    torch.testing.assert_close(from_gguf, ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_llama_cpp_runs_the_untied_model(untied_run, tmp_path):
    from exporting import log_probabilities

    from libqat import llama_cpp

    if not llama_cpp.available():
        pytest.skip("needs xllamacpp: pip install xllamacpp")
    from transformers import AutoModelForCausalLM

    path = untied_run / "run" / "model.qat.safetensors"
    works("export", path, tmp_path / "a.gguf")
    works("export", path, tmp_path / "hf", "--target", "hf")
    ids = tokens().flatten().tolist()
    expected = log_probabilities(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), ids)
    scores = np.array(llama_cpp.score(tmp_path / "a.gguf", ids))
    # llama.cpp rounds activations to 8 bits: see BOUND_8_BIT in test_llama_cpp.py.
    assert np.sqrt(np.mean((scores - expected) ** 2)) < 0.04 * expected.std()


def test_the_command_line_says_what_requantizing_gives(untied_run, tmp_path):
    path = untied_run / "run" / "model.qat.safetensors"
    out = tmp_path / "hf"
    found = json.loads(works("export", path, out, "--target", "hf", "--dtype", "bfloat16", "--json"))
    assert found["target"] == "hf"
    assert (found["dtype"], found["exact"], found["requantizes_exactly"]) == ("bfloat16", False, False)
    assert found["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    fails("export", path, out, "--target", "hf", says=["earlier export", "--overwrite"])
    fails(
        *("export", path, out, "--target", "hf", "--overwrite", "--dtype", "bfloat16", "--require-exact"),
        says=["require_exact", "lm_head.weight ("],
    )
    works("export", path, out, "--target", "hf", "--overwrite", "--require-exact")
    fails("export", path, tmp_path / "a.gguf", "--dtype", "bfloat16", says='target "hf" only')
