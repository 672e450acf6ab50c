"""Tiny random models of the Gemma and Qwen families, one for each published shape."""

import torch
import transformers

VOCABULARY = 400
SLIDING, FULL = "sliding_attention", "full_attention"
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA4 = COMMON | {
    "global_head_dim": 64,
    "sliding_window": 16,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
}
UNIFIED = {key: value for key, value in GEMMA4.items() if "per_layer_input" not in key}
SHARED = {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2}
NO_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
PAIRS = [SLIDING, FULL] * 2


def _layers(types):
    return {"layer_types": types, "num_hidden_layers": len(types)}


SETTINGS = {
    "qwen3": ("Qwen3", COMMON | {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3Text",
        COMMON | {"num_hidden_layers": 7, "query_pre_attn_scalar": 32, "sliding_window": 16},
    ),
    "e2b": (
        "Gemma4Text",
        GEMMA4
        | SHARED
        | {"use_double_wide_mlp": True, "num_key_value_heads": 1}
        | _layers([SLIDING, SLIDING, FULL, SLIDING, FULL]),
    ),
    "e4b": ("Gemma4Text", GEMMA4 | SHARED | _layers([SLIDING, SLIDING, FULL, SLIDING, FULL])),
    "12b": ("Gemma4UnifiedText", UNIFIED | NO_VALUES | _layers(PAIRS)),
    "26b": ("Gemma4Text", GEMMA4 | NO_VALUES | EXPERTS | _layers(PAIRS)),
    "31b": ("Gemma4Text", GEMMA4 | NO_VALUES | {"num_attention_heads": 8} | _layers(PAIRS)),
}
SHAPES = tuple(SETTINGS)
GEMMA4_SHAPES = ("e2b", "e4b", "12b", "26b", "31b")

CLASSES = {
    "Qwen3": "Qwen3ForCausalLM",
    "Gemma3Text": "Gemma3ForCausalLM",
    "Gemma4Text": "Gemma4ForCausalLM",
    "Gemma4UnifiedText": "Gemma4UnifiedForCausalLM",
}


def config_of(shape, **changes):
    name, settings = SETTINGS[shape]
    return getattr(transformers, f"{name}Config")(**(settings | changes))


def make_family(shape, seed=0, **changes):
    """A model in float32 with random norms and scalars, in eval mode."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, CLASSES[SETTINGS[shape][0]])
    model = model_class(config_of(shape, **changes)).float().eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model):
    """What is constant in a new model, so that a mistake in it shows.

    Norms of queries and keys stay small where nothing else divides their product, as in published models: the
    attention would otherwise pick single tokens, and a rounding change which.
    """
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("q_norm.weight", "k_norm.weight")) and "gemma4" in model.config.model_type:
            value.uniform_(0.3, 0.6)
        elif name.endswith("norm.weight") or "layernorm" in name:
            value.add_(torch.empty_like(value).uniform_(-0.3, 0.3))
        elif name.endswith("router.proj.weight"):
            value.normal_(std=0.5)  # clear choices, which a rounding of its input does not change
        elif name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
            value.uniform_(0.7, 1.1)


POLICY = {
    "rules": [
        {"match": ".*embed_tokens", "weight": "q8_0"},
        {"match": ".*embed_tokens_per_layer", "weight": "q4_0", "optional": True},
        {"match": r".*self_attn\..*_proj", "weight": "q4_0"},
        {"match": r".*layers\.0\.mlp\.down_proj", "weight": "tq2_0"},
        {"match": r".*mlp\..*_proj", "weight": "q4_0"},
        {"match": r".*experts\.gate_up_proj", "weight": "q4_0", "optional": True},
        {"match": r".*experts\.down_proj", "weight": "q8_0", "optional": True},
        {"match": r".*per_layer_(input_gate|projection)", "weight": "q8_0", "optional": True},
        {"match": r".*per_layer_model_projection", "weight": "bf16", "optional": True},
    ]
}
"""Every matrix but the router, on grids that the package `gguf` decodes; norms and scalars stay float."""


def with_two_bits():
    """The same with ggml's newest 2-bit type, which that package does not know, in the MLPs."""
    rules = [rule | ({"weight": "q2_0"} if "mlp" in rule["match"] else {}) for rule in POLICY["rules"]]
    return {"rules": rules}
