"""GGUF files of the Gemma and Qwen families, back to Hugging Face."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from families import SHAPES

import libqat
from libqat import _core

pytest_plugins = ["gguf_families"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_file_is_the_model_again(tmp_path, family_file, shape):
    model, checkpoint, path = family_file(shape)
    back = libqat.import_checkpoint(path)
    assert back.grids == {key: grid for key, grid in checkpoint.grids.items() if key in back.grids}
    libqat.export(back, tmp_path / "a.gguf", tokenizer_from="none")
    assert (tmp_path / "a.gguf").read_bytes() == path.read_bytes()

    config = json.loads(back.config)
    text_config = transformers.AutoConfig.for_model(**config)
    again = transformers.AutoModelForCausalLM.from_config(text_config).float().eval()
    weights = _core.dequantize(back)
    missing = again.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys in ([], ["lm_head.weight"])
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        expected, got = model(ids).logits, again(ids).logits
    # the same float32 weights (but for Gemma 3's norms, which lose an ulp when 1 is added and taken away),
    # multiplied by other kernels: sums in another order
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def rewritten(path, out, fields=None, drop=(), tensors=None):
    """A copy made by the package `gguf`, with other fields ((type, value), arrays as lists) and tensors."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    changed = fields or {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in (*drop, *changed):
            continue
        kinds = field.types
        sub_type = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kinds[0], sub_type=sub_type)
    for name, (kind, value) in changed.items():
        kind = gguf.GGUFValueType[kind]
        if isinstance(value, list):
            writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if tensor.name not in (*drop, *(tensors or {})):
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def key(name):
    return f"gemma4.{name}"


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ("e2b", {"drop": [key("attention.sliding_window_pattern")]}, "attention.sliding_window_pattern"),
        ("e2b", {"drop": [key("attention.key_length")]}, "gemma4.attention.key_length"),
        ("e2b", {"drop": [key("attention.key_length_swa")]}, "gemma4.attention.key_length_swa"),
        ("e2b", {"drop": [key("attention.sliding_window")]}, "gemma4.attention.sliding_window"),
        ("e2b", {"drop": [key("feed_forward_length")]}, "gemma4.feed_forward_length"),
        ("e2b", {"drop": [key("block_count")]}, "gemma4.block_count"),
        ("e2b", {"drop": ["blk.4.attn_q.weight"]}, "got none for blk.4.attn_q.weight"),
        ("e2b", {"drop": ["per_layer_proj_norm.weight"]}, "got none for per_layer_proj_norm.weight"),
        (
            "e2b",
            {"fields": {key("attention.sliding_window_pattern"): ("BOOL", [True, False])}},
            "sliding_window_pattern: expected a value for each of 5 layers, got 2",
        ),
        (
            "e2b",
            {"fields": {key("attention.sliding_window_pattern"): ("UINT32", 5)}},
            "expected array of bool, got u32",
        ),
        (
            "e2b",
            {"fields": {key("feed_forward_length"): ("INT32", [256, 256, 256, 512])}},
            "feed_forward_length: expected a value for each of 5 layers, got 4",
        ),
        (
            "e2b",
            {"fields": {key("feed_forward_length"): ("INT32", [256, 256, 512, 512, 512])}},
            "feed_forward_length: expected one number for all layers with their own keys",
        ),
        (
            "e2b",
            {"fields": {key("feed_forward_length"): ("INT32", [256, 256, 256, 768, 768])}},
            "as wide or twice as wide",
        ),
        (
            "26b",
            {"fields": {key("attention.head_count_kv"): ("INT32", [2, 1, 1, 1])}},
            "head_count_kv: expected one number for all layers with a sliding window",
        ),
        (
            "26b",
            {"fields": {key("attention.head_count_kv"): ("INT32", [3, 1, 3, 1])}},
            "num_key_value_heads",
        ),
        (
            "26b",
            {"fields": {key("attention.value_length"): ("UINT32", 32)}},
            "gemma4.attention.value_length: expected 64 as the other keys",
        ),
        ("26b", {"drop": [key("expert_used_count")]}, "top_k_experts"),
        ("26b", {"drop": ["blk.0.ffn_down_exps.scale"]}, "got none for blk.0.ffn_down_exps.scale"),
        ("e4b", {"fields": {key("attention.shared_kv_layers"): ("UINT32", 5)}}, "layers with their own keys"),
        ("e2b", {"fields": {key("block_count"): ("UINT32", 1 << 30)}}, "gemma4.block_count: expected 1 to"),
        (
            "31b",
            {"tensors": {"rope_freqs.weight": np.array([1, 1e30] * 16, np.float32)}},
            "rope_freqs.weight: expected the divisors",
        ),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, family_file, shape, changes, message):
    rewritten(family_file(shape)[2], tmp_path / "a.gguf", **changes)
    with pytest.raises((libqat.FileError, libqat.UnsupportedError)) as caught:
        libqat.import_checkpoint(tmp_path / "a.gguf")
    assert message in str(caught.value)
    assert "a.gguf" in str(caught.value)


def test_dead_keys_of_a_file_are_passed_over(tmp_path, family_file):
    _, _, path = family_file("e2b")
    dead = {
        "blk.3.attn_k.weight": np.ones((32, 64), np.float32),
        "blk.3.attn_k_norm.weight": np.ones(32, np.float32),
    }
    rewritten(path, tmp_path / "a.gguf", tensors=dead)
    back = libqat.import_checkpoint(tmp_path / "a.gguf")
    assert "model.layers.3.self_attn.k_proj.weight" not in back.floats
    libqat.export(back, tmp_path / "b.gguf", tokenizer_from="none")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()
