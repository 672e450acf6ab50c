"""libqat's decoder on folders whose tensors or configuration do not fit, and on what it passes over."""

import json
import shutil

import pytest
import torch
from random_llama import LOGITS, edit_config, tokens_for
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import libqat

pytest_plugins = ["random_llama"]


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_equal_stored_head_stays_tied(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = libqat.load_model(folder)
    assert "lm_head.weight" not in loaded.decoder.parameters()
    assert json.loads(loaded.config)["tie_word_embeddings"] is True


def test_different_stored_head_unties_as_in_transformers(folder):
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()})
    )
    loaded = libqat.load_model(folder)
    assert json.loads(loaded.config)["tie_word_embeddings"] is False
    reference = LlamaForCausalLM.from_pretrained(folder)
    tokens = tokens_for(reference)
    with torch.no_grad():
        torch.testing.assert_close(loaded.decoder(tokens), reference(tokens).logits, **LOGITS)


def test_known_derived_tensors_are_passed_over(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    libqat.load_model(folder)


def test_every_tensor_that_does_not_fit_is_listed(folder):
    def damage(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 95)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)

    edit_tensors(folder, damage)
    with pytest.raises(libqat.FileError) as caught:
        libqat.load_model(folder)
    message = str(caught.value)
    assert "missing model.layers.0.mlp.up_proj.weight, model.norm.weight;" in message
    assert "misshapen model.layers.1.self_attn.k_proj.weight [32, 95] instead of [32, 96];" in message
    assert "unknown model.layers.0.self_attn.q_proj.bias" in message
    assert str(folder) in message


def test_integer_weights_are_refused(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(96, dtype=torch.int32)}))
    with pytest.raises(
        libqat.UnsupportedError, match=r"model\.norm\.weight: expected F32, F16 or BF16, got I32"
    ):
        libqat.load_model(folder)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ],
)
def test_missing_config_key_is_named(folder, key):
    edit_config(folder, drop=[key])
    with pytest.raises(libqat.FileError, match=f'config.json: config: "{key}": expected .*, got nothing'):
        libqat.load_model(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": "96"}, libqat.FileError, '"hidden_size": expected a number, got "96"'),
        ({"num_hidden_layers": 0}, libqat.FileError, '"num_hidden_layers": expected a whole number above 0'),
        ({"vocab_size": 2**63 + 5}, libqat.FileError, '"vocab_size": expected a whole number'),
        ({"vocab_size": 2**31, "hidden_size": 2**31 - 2, "head_dim": 16}, libqat.FileError, "weights"),
        ({"num_hidden_layers": 2**31}, libqat.FileError, '"num_hidden_layers": expected at most 4096'),
        ({"num_key_value_heads": 4}, libqat.FileError, '"num_key_value_heads": expected a divisor'),
        ({"head_dim": 15}, libqat.FileError, '"head_dim": expected an even number'),
        ({"rms_norm_eps": -1.0}, libqat.FileError, '"rms_norm_eps"'),
        ({"tie_word_embeddings": 1}, libqat.FileError, '"tie_word_embeddings": expected true or false'),
        ({"rope_parameters": {"rope_theta": 0}}, libqat.FileError, '"rope_theta"'),
        ({"rope_parameters": []}, libqat.FileError, '"rope_parameters": expected an object'),
        (
            {"model_type": "mistral"},
            libqat.UnsupportedError,
            '"model_type": expected .*"llama" or .*, got "mistral"',
        ),
        ({"hidden_act": "gelu"}, libqat.UnsupportedError, '"hidden_act"'),
        ({"attention_bias": 1}, libqat.FileError, '"attention_bias": expected true or false'),
        ({"attention_bias": True}, libqat.FileError, r"missing .*k_proj\.bias"),
        ({"mlp_bias": True}, libqat.FileError, r"missing .*up_proj\.bias"),
        ({"use_sliding_window": True}, libqat.UnsupportedError, '"use_sliding_window": expected false'),
        ({"layer_types": ["full_attention"] * 2}, libqat.FileError, '"layer_types.2": expected the kind'),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            libqat.FileError,
            '"sliding_window": expected a whole number',
        ),
        ({"layer_types": ["linear_attention"] * 3}, libqat.UnsupportedError, '"layer_types.0"'),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            libqat.UnsupportedError,
            '"quantization_config"',
        ),
    ],
)
def test_config_values_that_cannot_be_computed(folder, changes, error, message):
    edit_config(folder, **changes)
    with pytest.raises(error, match=message) as caught:
        libqat.load_model(folder)
    assert str(folder) in str(caught.value)


def test_head_dim_must_divide_when_absent(folder):
    edit_config(folder, drop=["head_dim"], hidden_size=97)
    with pytest.raises(libqat.FileError, match='"hidden_size": expected a multiple of num_attention_heads'):
        libqat.load_model(folder)


def test_files_that_are_not_models(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for path, message in [
        (empty, "config.json"),
        (empty / "absent", "got nothing there"),
        (folder / "model.safetensors", "expected a Hugging Face directory or a .gguf file"),
    ]:
        with pytest.raises(libqat.FileError, match=message):
            libqat.load_model(path)
    (empty / "config.json").write_text("{")
    with pytest.raises(libqat.FileError, match="expected JSON"):
        libqat.load_model(empty)
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(libqat.FileError, match="safetensors"):
        libqat.load_model(empty)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(libqat.FileError, match=r"model\.safetensors"):
        libqat.load_model(folder)
