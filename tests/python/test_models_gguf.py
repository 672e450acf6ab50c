"""Reading llama GGUF files: against the `gguf` package's decoders; the real SmolLM2 against transformers."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM

import libqat

LAYERS, HEADS, KV_HEADS, HIDDEN, FF, VOCAB = 2, 4, 2, 64, 96, 50
HEAD_DIM = 16

# The types of the file's matrices in turn, so that each occurs in several roles.
TYPES = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0]


def interleave(weight, heads):
    """Hugging Face's row order -> llama.cpp's: within a head, row j + D/2 moves next to row j."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def disentangle(weight, heads):
    """The way back."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def shapes(tied):
    """GGUF name -> (Hugging Face name, shape, heads whose rows are interleaved)."""
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    result = {
        "token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN), 0),
        "output_norm.weight": ("model.norm.weight", (HIDDEN,), 0),
    }
    if not tied:
        result["output.weight"] = ("lm_head.weight", (VOCAB, HIDDEN), 0)
    for i in range(LAYERS):
        for name, hf, shape, heads in [
            ("attn_norm", "input_layernorm", (HIDDEN,), 0),
            ("attn_q", "self_attn.q_proj", (query, HIDDEN), HEADS),
            ("attn_k", "self_attn.k_proj", (key, HIDDEN), KV_HEADS),
            ("attn_v", "self_attn.v_proj", (key, HIDDEN), 0),
            ("attn_output", "self_attn.o_proj", (HIDDEN, query), 0),
            ("ffn_norm", "post_attention_layernorm", (HIDDEN,), 0),
            ("ffn_gate", "mlp.gate_proj", (FF, HIDDEN), 0),
            ("ffn_up", "mlp.up_proj", (FF, HIDDEN), 0),
            ("ffn_down", "mlp.down_proj", (HIDDEN, FF), 0),
        ]:
            result[f"blk.{i}.{name}.weight"] = (f"model.layers.{i}.{hf}.weight", shape, heads)
    return result


KEYS = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FF,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": VOCAB,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def write(path, tied=True, keys=None, drop=(), extra=None, architecture="llama"):
    """Writes a random model with the `gguf` package; returns Hugging Face name -> what it decodes to."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (KEYS | (keys or {})).items():
        if key in drop:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    generator = np.random.default_rng(0)
    weights = {}
    for i, (name, (hf, shape, heads)) in enumerate(shapes(tied).items()):
        kind = TYPES[i % len(TYPES)] if len(shape) > 1 else Type.F32
        weight = generator.normal(scale=0.3, size=shape).astype(np.float32)
        data = gguf.quants.quantize(interleave(weight, heads) if heads else weight, kind)
        decoded = gguf.quants.dequantize(data, kind)
        weights[hf] = disentangle(decoded, heads) if heads else decoded
        if name not in drop:
            writer.add_tensor(name, data, raw_dtype=kind)
    for name, (data, kind) in (extra or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def reference_of(config, weights):
    """transformers' model with these weights; a tied head is filled by tying."""
    model = LlamaForCausalLM(LlamaConfig(**json.loads(config))).eval()
    result = model.load_state_dict(
        {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, strict=False
    )
    assert not result.unexpected_keys
    assert result.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    model.tie_weights()
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_logits(tmp_path, tied):
    path = tmp_path / "model.gguf"
    weights = write(path, tied)
    loaded = libqat.load_model(path)
    parameters = loaded.decoder.parameters()
    assert parameters.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(parameters[name], torch.from_numpy(np.array(weight))), name
    reference = reference_of(loaded.config, weights)
    tokens = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # float32 sums in another order: differences of about 1e-5 at logits of up to 10.
        torch.testing.assert_close(loaded.decoder(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
    assert loaded.tokenizer == str(path)


def test_config_is_what_hugging_face_would_have_written(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    config = LlamaConfig(**json.loads(libqat.load_model(path).config))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (HIDDEN, FF, LAYERS)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        HEADS,
        KV_HEADS,
        HEAD_DIM,
    )
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (VOCAB, 128, 1e-5)
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (1, 2, True)


@pytest.mark.parametrize("key", ["llama.vocab_size", "llama.rope.dimension_count", "llama.rope.freq_base"])
def test_keys_that_older_files_lack(tmp_path, key):
    path = tmp_path / "model.gguf"
    write(path, drop=[key])
    loaded = json.loads(libqat.load_model(path).config)
    assert loaded["vocab_size"] == VOCAB
    assert LlamaConfig(**loaded).rope_parameters["rope_theta"] == (10000.0 if "freq" in key else 5000.0)


def test_rope_divisors_of_one_are_passed_over(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, extra={"rope_freqs.weight": (np.ones(HEAD_DIM // 2, np.float32), Type.F32)})
    libqat.load_model(path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"drop": ["llama.block_count"]}, libqat.FileError, r"llama\.block_count"),
        ({"drop": ["llama.attention.head_count"]}, libqat.FileError, r"llama\.attention\.head_count"),
        ({"drop": ["blk.1.ffn_up.weight"]}, libqat.FileError, r"missing model\.layers\.1\.mlp\.up_proj"),
        ({"keys": {"llama.feed_forward_length": 128}}, libqat.FileError, r"misshapen .*mlp\.gate_proj"),
        ({"keys": {"llama.embedding_length": "64"}}, libqat.FileError, r"llama\.embedding_length"),
        ({"keys": {"llama.attention.head_count_kv": 3}}, libqat.FileError, "num_key_value_heads"),
        (
            {"keys": {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}},
            libqat.UnsupportedError,
            r"llama\.rope\.dimension_count: expected 16 .*, got 8",
        ),
        ({"keys": {"llama.expert_count": 8}}, libqat.UnsupportedError, r"llama\.expert_count"),
        ({"architecture": "mamba"}, libqat.UnsupportedError, "mamba"),
        (
            {"extra": {"blk.0.attn_q.scale": (np.ones(1, np.float32), Type.F32)}},
            libqat.FileError,
            r"unknown blk\.0\.attn_q\.scale",
        ),
        (
            {"extra": {"blk.0.attn_q.bias": (np.ones(64, np.float32), Type.F32)}},
            libqat.FileError,
            r"missing .*k_proj\.bias",
        ),
        (
            {"extra": {"blk.0.attn_q.bias": (np.zeros(36, np.uint8), Type.Q4_0)}},
            libqat.UnsupportedError,
            r"blk\.0\.attn_q\.bias: expected a bias in a float type, got Q4_0",
        ),
        (
            {
                "drop": ["token_embd.weight"],
                "extra": {"token_embd.weight": (np.zeros((50, 36), np.uint8), Type.IQ4_NL)},
            },
            libqat.UnsupportedError,
            r"token_embd\.weight: .*IQ4_NL",
        ),
    ],
)
def test_files_that_cannot_be_loaded(tmp_path, changes, error, message):
    path = tmp_path / "model.gguf"
    write(path, **changes)
    with pytest.raises(error, match=message) as caught:
        libqat.load_model(path)
    assert str(path) in str(caught.value)


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    whole = path.read_bytes()
    for content in (b"", b"GGUF", whole[: len(whole) // 2], b"not a model" * 100):
        path.write_bytes(content)
        with pytest.raises(libqat.FileError, match=r"model\.gguf"):
            libqat.load_model(path)


def test_names_that_are_no_text(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_up", b"blk.0.ff\xff_up"))
    with pytest.raises(libqat.FileError, match=r"missing .*up_proj.* unknown blk\.0\.ff\ufffd_up"):
        libqat.load_model(path)


def test_real_smollm2_equals_transformers(smollm2):
    loaded = libqat.load_model(smollm2)
    heads = {"attn_q": 9, "attn_k": 3}
    names = {gguf_name: hf for gguf_name, (hf, _, _) in shapes(True).items()}
    weights = {}
    for tensor in gguf.GGUFReader(smollm2).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        short = tensor.name.replace(f"blk.{layer}.", "blk.0.")
        count = heads.get(short.split(".")[2] if short.startswith("blk.") else "")
        hf = names[short].replace("layers.0.", f"layers.{layer}.")
        weights[hf] = disentangle(values, count) if count else values
    reference = reference_of(loaded.config, weights)
    for name, parameter in loaded.decoder.parameters().items():
        assert torch.equal(parameter, torch.from_numpy(np.array(weights[name]))), name
    # Logits reach 30, where float32 numbers are 2e-6 apart, and the sums run through 30 layers.
    tokens = torch.randint(0, 49152, (1, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.decoder(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
