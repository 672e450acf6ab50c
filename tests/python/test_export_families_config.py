"""Configurations of the families: spellings that give the same GGUF, and what llama.cpp would not follow."""

import json

import pytest
from gguf_families import keys_of, prepared_checkpoint, with_config
from shapes import FULL, SLIDING

import libqat

pytest_plugins = ["gguf_families"]


@pytest.mark.parametrize("shape", ["e2b", "26b"])
def test_published_and_current_spellings_give_the_same_file(tmp_path, shape):
    model, checkpoint = prepared_checkpoint(shape)
    current = json.loads(checkpoint.config)
    assert current["per_layer_config"]  # as transformers 5 writes it
    assert "global_head_dim" not in current
    flat = {"global_head_dim": 64, "num_global_key_value_heads": 1 if shape == "26b" else None}
    published = with_config(model, flat, drop=["per_layer_config"])
    libqat.export(checkpoint, tmp_path / "a.gguf")
    libqat.export(published, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_older_spellings_of_gemma3_give_the_same_file(tmp_path):
    model, checkpoint = prepared_checkpoint("gemma3")
    libqat.export(checkpoint, tmp_path / "a.gguf")
    spelled = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    older = with_config(model, spelled, drop=["rope_parameters", "layer_types", "_sliding_window_pattern"])
    libqat.export(older, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_gemma3s_long_context_scales_the_full_layers_alone(tmp_path):
    model, checkpoint = prepared_checkpoint("gemma3")
    config = json.loads(checkpoint.config)
    config["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    libqat.export(with_config(model, config), tmp_path / "a.gguf")
    keys = keys_of(tmp_path / "a.gguf")
    assert keys["gemma3.rope.scaling.type"] == ("STRING", "linear")
    assert keys["gemma3.rope.scaling.factor"] == ("FLOAT32", 8.0)
    back = json.loads(libqat.import_checkpoint(tmp_path / "a.gguf").config)
    assert back["rope_parameters"] == config["rope_parameters"]


@pytest.mark.parametrize(
    ("shape", "changes", "error", "message"),
    [
        ("gemma3", {"query_pre_attn_scalar": 64}, "Unsupported", "query_pre_attn_scalar: expected 32, which"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "Unsupported", "attn_logit_softcapping: expected false"),
        ("gemma3", {"use_bidirectional_attention": True}, "Unsupported", "use_bidirectional_attention"),
        ("gemma3", {"hidden_activation": "silu"}, "Unsupported", 'hidden_activation: expected "gelu_pytorch'),
        (
            "gemma3",
            {"layer_types": [SLIDING, FULL, FULL, FULL, FULL, FULL, FULL]},
            "Unsupported",
            "layer_types: expected each n-th layer",
        ),
        (
            "gemma3",
            {"layer_types": [FULL] * 7},
            "Unsupported",
            "layer_types: expected a layer with a sliding",
        ),
        ("gemma3", {"layer_types": [SLIDING]}, "Argument", '"layer_types.1": expected the kind of each of 7'),
        (
            "gemma3",
            {"num_hidden_layers": 8, "layer_types": None},
            "Argument",
            "none for model.layers.7.input",
        ),
        ("e2b", {"use_bidirectional_attention": "all"}, "Unsupported", "use_bidirectional_attention"),
        ("e2b", {"num_kv_shared_layers": 3}, "Argument", '"num_kv_shared_layers": expected an unshared'),
        (
            "e2b",
            {"layer_types": [FULL, FULL, SLIDING, SLIDING, FULL]},
            "Unsupported",
            "layer_types: expected a layer with a sliding window and then one without",
        ),
        (
            "e2b",
            {"hidden_size_per_layer_input": 0},
            "Unsupported",
            "embed_tokens_per_layer.weight: expected a",
        ),
        ("e4b", {"attention_k_eq_v": True}, "Unsupported", "layers.2.self_attn.v_proj.weight: expected a"),
        (
            "26b",
            {"enable_moe_block": False},
            "Unsupported",
            "experts.down_proj: expected a tensor of a gemma4",
        ),
        ("26b", {"num_experts": None}, "Argument", '"num_experts": expected a whole number, got nothing'),
        ("31b", {"attention_k_eq_v": False}, "Argument", "none for model.layers.1.self_attn.v_proj.weight"),
        (
            "31b",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "Unsupported",
            'rope_parameters.sliding_attention.rope_type: expected "default"',
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path, family_file, shape, changes, error, message
):
    checkpoint = with_config(family_file(shape)[0], changes)
    with pytest.raises(getattr(libqat, f"{error}Error")) as caught:
        libqat.export(checkpoint, tmp_path / "a.gguf")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
