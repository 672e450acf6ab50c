"""Gemma and Qwen models of every shape as GGUF, against an independent account."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from exporting import make_kind
from families import GEMMA4_SHAPES, POLICY, SHAPES, VOCABULARY, config_of, make_family
from gguf_families import hf_name, keys_of, prepared_checkpoint, read
from shapes import randomize

import libqat
from libqat import _core

pytest_plugins = ["gguf_families"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_file_decodes_to_the_checkpoint(family_file, shape):
    _, checkpoint, path = family_file(shape)
    tensors, _ = read(path)
    weights = {key: value.numpy() for key, value in _core.dequantize(checkpoint).items()}
    weights.pop("lm_head.weight", None)
    assert {hf_name(name, shape) for name in tensors} == weights.keys()
    offset = np.float32(1.0 if shape == "gemma3" else 0.0)
    for name, (_, values) in tensors.items():
        expected = weights[hf_name(name, shape)]
        if name.endswith("norm.weight"):
            expected = expected + offset
        assert values.shape == expected.shape, name
        differing = int((values.view(np.uint32) != np.asarray(expected, np.float32).view(np.uint32)).sum())
        assert differing == 0, name
    assert libqat.verify(path, checkpoint) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_is_on_the_policys_grid(family_file, shape):
    _, _, path = family_file(shape)
    tensors, _ = read(path)
    kinds = {name: kind for name, (kind, _) in tensors.items()}
    for name, (_, values) in tensors.items():
        if values.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            assert kinds[name] == "F32", name  # what llama.cpp wants of norms, scalars and routers
        else:
            assert kinds[name] in ("Q8_0", "Q4_0", "TQ2_0", "BF16"), name
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "TQ2_0"
    if shape == "26b":
        assert kinds["blk.1.ffn_gate_up_exps.weight"] == "Q4_0"
        assert kinds["blk.1.ffn_down_exps.weight"] == "Q8_0"
    if shape in ("e2b", "e4b"):
        assert kinds["per_layer_token_embd.weight"] == "Q4_0"
        assert kinds["per_layer_model_proj.weight"] == "BF16"


COMMON_KEYS = {
    "vocab_size": ("UINT32", VOCABULARY),
    "context_length": ("UINT32", 256),
    "embedding_length": ("UINT32", 64),
    "feed_forward_length": ("UINT32", 256),
    "attention.head_count": ("UINT32", 4),
    "attention.head_count_kv": ("UINT32", 2),
    "attention.layer_norm_rms_epsilon": ("FLOAT32", float(np.float32(1e-6))),
}
WINDOW_KEYS = COMMON_KEYS | {
    "attention.sliding_window": ("UINT32", 16),
    "rope.freq_base": ("FLOAT32", 1e6),
    "rope.freq_base_swa": ("FLOAT32", 1e4),
}
GEMMA4_KEYS = WINDOW_KEYS | {
    "block_count": ("UINT32", 4),
    "attention.key_length": ("UINT32", 64),
    "attention.value_length": ("UINT32", 64),
    "attention.key_length_swa": ("UINT32", 32),
    "attention.value_length_swa": ("UINT32", 32),
    "attention.sliding_window_pattern": ("BOOL", [True, False, True, False]),
    "attention.shared_kv_layers": ("UINT32", 0),
    "embedding_length_per_layer_input": ("UINT32", 0),
    "final_logit_softcapping": ("FLOAT32", 30.0),
    "rope.dimension_count": ("UINT32", 64),
    "rope.dimension_count_swa": ("UINT32", 32),
}
SHARED_KEYS = GEMMA4_KEYS | {
    "block_count": ("UINT32", 5),
    "attention.sliding_window_pattern": ("BOOL", [True, True, False, True, False]),
    "attention.shared_kv_layers": ("UINT32", 2),
    "embedding_length_per_layer_input": ("UINT32", 32),
}
PER_LAYER_HEADS = {"attention.head_count_kv": ("INT32", [2, 1, 2, 1])}
KEYS = {
    "qwen3": COMMON_KEYS
    | {
        "block_count": ("UINT32", 3),
        "attention.key_length": ("UINT32", 32),
        "attention.value_length": ("UINT32", 32),
        "rope.freq_base": ("FLOAT32", 10000.0),
    },
    "gemma3": WINDOW_KEYS
    | {
        "block_count": ("UINT32", 7),
        "attention.key_length": ("UINT32", 32),
        "attention.value_length": ("UINT32", 32),
    },
    "e2b": SHARED_KEYS
    | {
        "attention.head_count_kv": ("UINT32", 1),
        "feed_forward_length": ("INT32", [256, 256, 256, 512, 512]),
    },
    "e4b": SHARED_KEYS,
    "12b": GEMMA4_KEYS | PER_LAYER_HEADS,
    "26b": GEMMA4_KEYS
    | PER_LAYER_HEADS
    | {
        "expert_count": ("UINT32", 4),
        "expert_used_count": ("UINT32", 2),
        "expert_feed_forward_length": ("UINT32", 64),
    },
    "31b": GEMMA4_KEYS | PER_LAYER_HEADS | {"attention.head_count": ("UINT32", 8)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_keys_are_exactly_those_of_the_published_files(family_file, shape):
    _, _, path = family_file(shape)
    architecture = shape if shape in ("qwen3", "gemma3") else "gemma4"
    expected = {f"{architecture}.{key}": value for key, value in KEYS[shape].items()}
    assert keys_of(path) == expected


@pytest.mark.parametrize("shape", GEMMA4_SHAPES)
def test_a_quarter_of_the_pairs_of_full_layers_turns(family_file, shape):
    _, _, path = family_file(shape)
    kind, divisors = read(path)[1]
    assert kind == "F32"
    assert divisors.tolist() == [1.0] * 8 + [np.float32(1e30)] * 24


def test_layers_that_share_keys_have_none_in_the_file_though_the_checkpoint_carries_them(tmp_path):
    """Published base models carry dead keys, values and norms for such layers."""
    model, checkpoint = prepared_checkpoint("e2b")
    libqat.export(checkpoint, tmp_path / "a.gguf")
    dead = {
        "model.layers.3.self_attn.k_proj.weight": torch.ones(32, 64),
        "model.layers.3.self_attn.v_proj.weight": torch.ones(32, 64),
        "model.layers.4.self_attn.k_norm.weight": torch.ones(64),
    }
    tensors = [(key, value.detach()) for key, value in model.state_dict(keep_vars=True).items()]
    quantizers = libqat.prepare(model, POLICY).quantizers()
    grids = {key: quantizer.grid for key, quantizer in quantizers.items()}
    with_dead = _core.freeze_tensors(
        [*tensors, *dead.items()], grids, config=checkpoint.config, tokenizer="none", policy=""
    )
    libqat.export(with_dead, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert libqat.verify(tmp_path / "b.gguf", with_dead) == []


def test_vision_and_audio_stay_float_and_out_of_the_file(tmp_path):
    text = config_of("e2b").to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "position_embedding_size": 64,
    }
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 64}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=audio)
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration(config).float().eval()
    randomize(model)
    rules = [
        rule | {"match": rule["match"].replace(".*", r"model\.language_model\..*", 1)}
        for rule in POLICY["rules"]
    ]
    prepared = libqat.prepare(model, {"rules": rules})
    assert len(prepared.quantizers()) == len(libqat.prepare(make_family("e2b"), POLICY).quantizers())
    checkpoint = libqat.freeze(model, tokenizer="none")
    assert any(key.startswith("model.vision_tower.") for key in checkpoint.floats)
    assert any(key.startswith("model.audio_tower.") for key in checkpoint.floats)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []
    tensors, _ = read(tmp_path / "a.gguf")
    weights = _core.dequantize(checkpoint)
    assert len(tensors) == sum(".language_model." in key for key in weights)
    for name, (_, values) in tensors.items():
        key = hf_name(name, "e2b").replace("model.", "model.language_model.", 1)
        np.testing.assert_array_equal(values, weights[key].float().numpy(), err_msg=name)


def test_gemma3_with_vision_is_its_decoder(tmp_path):
    text = config_of("gemma3").to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    libqat.prepare(model, POLICY)
    checkpoint = libqat.freeze(model, tokenizer="none")
    libqat.export(checkpoint, tmp_path / "a.gguf")
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []
    assert len(read(tmp_path / "a.gguf")[0]) == sum(
        key.startswith("model.language_model.") for key in _core.dequantize(checkpoint)
    )


def test_the_embedding_of_gemma3_ends_with_the_tokenizer(tmp_path):
    """Published files have rows that no token uses; the converter drops them."""
    _, checkpoint = prepared_checkpoint("gemma3", vocab_size=VOCABULARY + 64)
    make_kind("smollm", VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    libqat.export(checkpoint, tmp_path / "a.gguf", tokenizer_from=tmp_path)
    tensors, _ = read(tmp_path / "a.gguf")
    tokens = len(gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.ggml.tokens"].data)
    assert tokens < VOCABULARY + 64
    assert keys_of(tmp_path / "a.gguf")["gemma3.vocab_size"] == ("UINT32", tokens)
    whole = _core.dequantize(checkpoint)["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(tensors["token_embd.weight"][1], whole[:tokens])
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []
