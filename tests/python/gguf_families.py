"""GGUF files of the Gemma and Qwen families: their tensors and keys by names written down a second time."""

import json

import gguf
import numpy as np
import pytest
from families import POLICY, make_family

import libqat

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


@pytest.fixture(scope="session")
def family_file(tmp_path_factory):
    """shape -> (prepared model, checkpoint, file). Tests must not change them."""
    made = {}

    def get(shape):
        if shape not in made:
            path = tmp_path_factory.mktemp(shape) / "a.gguf"
            model, checkpoint = prepared_checkpoint(shape)
            libqat.export(checkpoint, path)
            made[shape] = (model, checkpoint, path)
        return made[shape]

    return get
