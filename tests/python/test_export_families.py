"""Gemma and Qwen models of every shape as GGUF: against an independent account, by llama.cpp, and back."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from exporting import log_probabilities, make_kind
from families import (
    FULL,
    GEMMA4_SHAPES,
    POLICY,
    SHAPES,
    SLIDING,
    VOCABULARY,
    config_of,
    make_family,
    randomize,
    with_two_bits,
)

import libqat
from libqat import _core, llama_cpp

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
WHOLE = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
OUTSIDE = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
}


def hf_name(name, shape):
    """The names of the published converter, written down a second time."""
    if not name.startswith("blk."):
        return f"model.{OUTSIDE[name.removesuffix('.weight')]}.weight"
    _, layer, part = name.split(".", 2)
    if part in WHOLE:
        return f"model.layers.{layer}.{WHOLE[part]}"
    part = part.removesuffix(".weight")
    hf = "post_attention_layernorm" if shape == "qwen3" and part == "ffn_norm" else PARTS[part]
    return f"model.layers.{layer}.{hf}.weight"


def read(path):
    """GGUF name -> (type, values) without rope_freqs, and rope_freqs."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        tensors[tensor.name] = (tensor.tensor_type.name, values.reshape(tensor.shape.tolist()[::-1]))
    return tensors, tensors.pop("rope_freqs.weight", None)


def keys_of(path):
    """key -> (type, value); arrays as (type of an element, list)."""
    fields = gguf.GGUFReader(path).fields
    kinds = {name: field.types[-1].name for name, field in fields.items()}
    return {
        name: (kinds[name], field.contents())
        for name, field in fields.items()
        if not name.startswith(("GGUF.", "general.", "tokenizer."))
    }


def prepared_checkpoint(shape, tokenizer="none", policy=POLICY, **changes):
    model = make_family(shape, **changes)
    libqat.prepare(model, policy)
    return model, libqat.freeze(model, tokenizer=tokenizer)


def with_config(model, changes=None, drop=()):
    """The checkpoint of a prepared model under a changed configuration."""
    config = json.loads(model.config.to_json_string()) | (changes or {})
    kept = {key: value for key, value in config.items() if key not in drop}
    return libqat.freeze(model, config=json.dumps(kept), tokenizer="none")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """shape -> (prepared model, checkpoint, file)."""
    made = {}

    def get(shape):
        if shape not in made:
            path = tmp_path_factory.mktemp(shape) / "a.gguf"
            model, checkpoint = prepared_checkpoint(shape)
            libqat.export(checkpoint, path)
            made[shape] = (model, checkpoint, path)
        return made[shape]

    return get


@pytest.mark.parametrize("shape", SHAPES)
def test_the_file_decodes_to_the_checkpoint(exported, shape):
    _, checkpoint, path = exported(shape)
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
def test_every_matrix_is_on_the_policys_grid(exported, shape):
    _, _, path = exported(shape)
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
        "block_count": ("UINT32", 2),
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
def test_the_keys_are_exactly_those_of_the_published_files(exported, shape):
    _, _, path = exported(shape)
    architecture = shape if shape in ("qwen3", "gemma3") else "gemma4"
    expected = {f"{architecture}.{key}": value for key, value in KEYS[shape].items()}
    assert keys_of(path) == expected


@pytest.mark.parametrize("shape", GEMMA4_SHAPES)
def test_a_quarter_of_the_pairs_of_full_layers_turns(exported, shape):
    _, _, path = exported(shape)
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


# ---- spellings of the configuration


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
    tmp_path, exported, shape, changes, error, message
):
    checkpoint = with_config(exported(shape)[0], changes)
    with pytest.raises(getattr(libqat, f"{error}Error")) as caught:
        libqat.export(checkpoint, tmp_path / "a.gguf")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---- back to Hugging Face


@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_file_is_the_model_again(tmp_path, exported, shape):
    model, checkpoint, path = exported(shape)
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
def test_broken_files_are_refused_by_name(tmp_path, exported, shape, changes, message):
    rewritten(exported(shape)[2], tmp_path / "a.gguf", **changes)
    with pytest.raises((libqat.FileError, libqat.UnsupportedError)) as caught:
        libqat.import_checkpoint(tmp_path / "a.gguf")
    assert message in str(caught.value)
    assert "a.gguf" in str(caught.value)


def test_dead_keys_of_a_file_are_passed_over(tmp_path, exported):
    _, _, path = exported("e2b")
    dead = {
        "blk.3.attn_k.weight": np.ones((32, 64), np.float32),
        "blk.3.attn_k_norm.weight": np.ones(32, np.float32),
    }
    rewritten(path, tmp_path / "a.gguf", tensors=dead)
    back = libqat.import_checkpoint(tmp_path / "a.gguf")
    assert "model.layers.3.self_attn.k_proj.weight" not in back.floats
    libqat.export(back, tmp_path / "b.gguf", tokenizer_from="none")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


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


# ---- llama.cpp


needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp"
)


VARIANTS = [
    ("gemma3", {"layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL, SLIDING]}),
    ("gemma3", {"num_hidden_layers": 5, "final_logit_softcapping": 5.0, "tie_word_embeddings": False}),
    ("e2b", {"tie_word_embeddings": False}),
    (
        "31b",
        {
            "final_logit_softcapping": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
    ),
    (
        "31b",
        {
            "attention_k_eq_v": False,
            "per_layer_config": {i: {"head_dim": 64, "num_key_value_heads": 1} for i in (1, 3)},
        },
    ),
]
"""What the published sizes do not have, but a configuration can say."""


def some_ids(count=48):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@needs_llama_cpp
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_the_shipped_weights(tmp_path, shape):
    make_kind("smollm", VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    model, checkpoint = prepared_checkpoint(shape, tokenizer=tmp_path, policy=with_two_bits())
    libqat.export(checkpoint, tmp_path / "a.gguf")
    ids = some_ids()
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        scores = np.array(llama.score(ids))
        chosen = [listed[0][0] for listed in llama.likeliest(ids)]
    # 8-bit inputs have a relative error of 0.5 % per product (see test_llama_cpp.py); 5 layers of 9 products
    # and the head add up as sqrt(46) * 0.5 % = 3.4 % of the spread; twice that is allowed.
    assert relative_error(scores, log_probabilities(model, ids), shape) < 0.07
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :, : checkpoint_rows(tmp_path / "a.gguf")]
    best, second = logits.topk(2).values.T
    clear = best - second > 0.2  # two errors of twice 7 % of the spread, 0.8
    swapped = [c != e for c, e, sure in zip(chosen, logits.argmax(-1), clear, strict=True) if sure]
    assert len(swapped) > len(ids) / 4
    assert sum(swapped) <= (len(ids) // 10 if shape == "26b" else 0)
    with libqat.prepare(model, with_two_bits()).enabled(False):  # the bound tells these weights from others
        assert relative_error(scores, log_probabilities(model, ids), shape) > 0.14


def checkpoint_rows(path):
    """Gemma 3's embedding ends with the tokenizer's tokens."""
    return libqat.import_checkpoint(path).weight("model.embed_tokens.weight").shape[0]


def relative_error(scores, expected, shape):
    """Rms against the spread. Tokens between two experts may get the other one: a tenth is left out."""
    errors = np.sort((scores - expected) ** 2)
    kept = len(errors) * 9 // 10 if shape == "26b" else len(errors)
    return np.sqrt(errors[:kept].mean()) / expected.std()


@needs_llama_cpp
@pytest.mark.parametrize(("shape", "changes"), [*((shape, {}) for shape in SHAPES), *VARIANTS])
def test_llama_cpp_chooses_the_same_tokens(tmp_path, shape, changes):
    """With float matrices nothing but float32 sums and the float16 cache differ."""
    make_kind("smollm", VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    model, checkpoint = prepared_checkpoint(shape, tokenizer=tmp_path, policy={"rules": []}, **changes)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    libqat.export(libqat.import_checkpoint(tmp_path / "a.gguf"), tmp_path / "b.gguf", tokenizer_from=tmp_path)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    ids = some_ids(32)
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        listed = llama.likeliest(ids, count=2)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logs = logits[:, : checkpoint_rows(tmp_path / "a.gguf")].log_softmax(-1)
    best, second = logs.topk(2).values.T
    # the cache rounds keys and values to 2^-12 of themselves, which 5 layers of attention amplify: 0.3 % of
    # log-probabilities of about 5, and as much for the second, may swap two that are nearer than that
    bound = 0.015
    clear = (best - second > 2 * bound).tolist()
    chosen = [first for (first, _), _ in listed]
    expected = logs.argmax(-1).tolist()
    assert [c for c, sure in zip(chosen, clear, strict=True) if sure] == [
        e for e, sure in zip(expected, clear, strict=True) if sure
    ]
    assert sum(clear) > len(ids) / 2
    np.testing.assert_allclose([first for (_, first), _ in listed], best.numpy(), atol=bound)
