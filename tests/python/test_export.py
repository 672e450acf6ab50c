import ctypes
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import make_llama
from exporting import checkpoint_of, hf_name, read_by_gguf_py, rows_as_trained

import libqat
from libqat import _core

MIXED = {
    "model.layers.0.self_attn.q_proj.weight": "q4_1",
    "model.layers.0.self_attn.k_proj.weight": "q8_0",
    "model.layers.0.self_attn.v_proj.weight": "f16",
    "model.layers.0.self_attn.o_proj.weight": "bf16",
    "model.layers.0.mlp.gate_proj.weight": "f32",
    "model.layers.0.mlp.up_proj.weight": "q4_1",
}


def bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_py_decodes_exactly_the_checkpoint(tmp_path, tied):
    checkpoint = checkpoint_of(make_llama(tied=tied), grids=MIXED)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    file = read_by_gguf_py(tmp_path / "a.gguf")
    weights = {key: value.numpy() for key, value in _core.dequantize(checkpoint).items()}
    if tied:
        del weights["lm_head.weight"]
    assert file.keys() == weights.keys()
    assert sum(int((bits(file[key][1]) != bits(weights[key])).sum()) for key in weights) == 0
    assert {kind for kind, _ in file.values()} == {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"}
    assert file["model.layers.0.self_attn.v_proj.weight"][0] == "F16"
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []


def ggml_decode(raw, kind, count):
    package = pytest.importorskip("libggml", reason="needs libggml-python: pip install libggml-python")
    library = ctypes.CDLL(str(Path(package.__file__).parent / "lib64" / "libggml-base.so"))
    decode = getattr(library, f"dequantize_row_{kind.lower()}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.empty(count, np.float32)
    decode(raw.ctypes.data, values.ctypes.data, count)
    return values


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "q8_0"])
def test_ggml_decodes_exactly_the_checkpoint(tmp_path, grid):
    checkpoint = checkpoint_of(make_llama(), grid=grid, embedding=grid)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    weights = _core.dequantize(checkpoint)
    compared = 0
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        if tensor.tensor_type.name != grid.upper():
            continue
        shape = tensor.shape.tolist()[::-1]
        raw = np.ascontiguousarray(tensor.data)
        values = ggml_decode(raw, grid, int(np.prod(shape))).reshape(shape)
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])
        if heads:
            values = rows_as_trained(values, heads)
        np.testing.assert_array_equal(bits(values), bits(weights[hf_name(tensor.name)].numpy()))
        compared += 1
    assert compared == 15


def test_query_and_key_rows_follow_the_published_formula(tmp_path):
    model = make_llama()
    number = torch.arange(64.0)[:, None].expand(64, 64)
    model.model.layers[1].self_attn.q_proj.weight.data = number.clone()
    model.model.layers[1].self_attn.k_proj.weight.data = number[:32].clone()
    checkpoint = checkpoint_of(model, grid="f32", embedding="f32")
    libqat.export(checkpoint, tmp_path / "a.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        rows = np.arange(heads * 16)
        expected = rows.reshape(heads, 2, 8).swapaxes(1, 2).reshape(-1)
        np.testing.assert_array_equal(tensors[f"blk.1.{name}.weight"][:, 0], expected)
    assert tensors["blk.1.attn_q.weight"][:4, 0].tolist() == [0, 8, 1, 9]


def test_metadata_says_what_the_configuration_says(tmp_path):
    model = make_llama()
    checkpoint = checkpoint_of(model)
    libqat.export(checkpoint, tmp_path / "a.gguf", name="A model")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    got = {name: (field.types[0].name, field.contents()) for name, field in fields.items()}
    config = model.config
    expected = {
        "general.architecture": ("STRING", "llama"),
        "general.type": ("STRING", "model"),
        "general.name": ("STRING", "A model"),
        "general.size_label": (
            "STRING",
            gguf.size_label(sum(p.numel() for p in model.parameters()), 0, 0, 0),
        ),
        "general.file_type": ("UINT32", 2),
        "general.quantization_version": ("UINT32", 2),
        "llama.vocab_size": ("UINT32", config.vocab_size),
        "llama.context_length": ("UINT32", 128),
        "llama.embedding_length": ("UINT32", 64),
        "llama.block_count": ("UINT32", 2),
        "llama.feed_forward_length": ("UINT32", 128),
        "llama.attention.head_count": ("UINT32", 4),
        "llama.attention.head_count_kv": ("UINT32", 2),
        "llama.attention.key_length": ("UINT32", 16),
        "llama.attention.value_length": ("UINT32", 16),
        "llama.attention.layer_norm_rms_epsilon": ("FLOAT32", float(np.float32(config.rms_norm_eps))),
        "llama.rope.dimension_count": ("UINT32", 16),
        "llama.rope.freq_base": ("FLOAT32", 10000.0),
        "tokenizer.ggml.model": ("STRING", "none"),
    }
    assert {name: value for name, value in got.items() if not name.startswith("GGUF.")} == expected


def test_rope_divisors_of_llama_3_are_those_of_transformers(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = make_llama(hidden_size=256, head_dim=64, rope_parameters=scaled)
    checkpoint = checkpoint_of(model)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    [divisors] = [
        t.data for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors if t.name == "rope_freqs.weight"
    ]
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    with_scaling, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    # transformers computes in float32: a few roundings of 6e-8 each
    np.testing.assert_allclose(plain / divisors, with_scaling.numpy(), rtol=1e-6)
    assert len(set(divisors.tolist()) - {1.0, 8.0}) > 1  # some pairs lie between the two ends
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []


def test_the_checkpoint_file_holds_the_same_bytes(tmp_path):
    checkpoint = checkpoint_of(make_llama(), grids=MIXED)
    _core.save(checkpoint, tmp_path / "a.qat.safetensors")
    assert libqat.verify(tmp_path / "a.qat.safetensors", checkpoint) == []
    libqat.export(checkpoint, tmp_path / "a.gguf")
    libqat.export(_core.load(tmp_path / "a.qat.safetensors"), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_verify_describes_differences(tmp_path):
    libqat.export(checkpoint_of(make_llama()), tmp_path / "a.gguf")
    other = make_llama()
    other.model.norm.weight.data[3] = 2.0
    [difference] = libqat.verify(tmp_path / "a.gguf", checkpoint_of(other))
    assert (difference.tensor, difference.what, difference.count) == ("model.norm.weight", "values", 1)
    assert difference.first == "row 3, position 0: expected bits 0x40000000, got bits 0x3f800000"
    assert repr(difference).startswith("model.norm.weight: values: 1 (row 3")


def test_an_interrupted_export_leaves_the_older_file(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"older")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        libqat.export(checkpoint_of(make_llama()), path, progress=interrupt)
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_progress_reaches_the_end(tmp_path):
    calls = []
    libqat.export(checkpoint_of(make_llama()), tmp_path / "a.gguf", progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


def test_errors_are_those_of_the_library(tmp_path):
    checkpoint = checkpoint_of(make_llama())
    with pytest.raises(libqat.ArgumentError, match="target: expected one of gguf, "):
        libqat.export(checkpoint, tmp_path / "a", target="onnx")
    with pytest.raises(libqat.ArgumentError, match="--tokenizer-from"):
        libqat.export(checkpoint_of(make_llama(), tokenizer=""), tmp_path / "a")
    reason = r"down_proj\.weight \(int4_channel\): .*cannot hold .* exactly"
    with pytest.raises(libqat.UnsupportedError, match=reason):
        libqat.export(checkpoint_of(make_llama(), grid="int4_channel"), tmp_path / "a")
    with pytest.raises(libqat.FileError, match="absent"):
        libqat.export(checkpoint, tmp_path / "absent" / "a")
    with pytest.raises(libqat.FileError):
        libqat.verify(tmp_path / "a", checkpoint)
    assert os.listdir(tmp_path) == []
