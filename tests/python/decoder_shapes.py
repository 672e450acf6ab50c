"""Small random models of every shape that libqat's decoder knows, made by transformers."""

import torch
import transformers

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, max_position_embeddings=128)
GEMMA = SIZES | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=8)
PERIOD = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA4 = GEMMA | dict(
    num_hidden_layers=6,
    layer_types=PERIOD * 2,
    global_head_dim=32,
    hidden_size_per_layer_input=0,
    final_logit_softcapping=30.0,
)
PER_LAYER_INPUTS = dict(hidden_size_per_layer_input=32, vocab_size_per_layer_input=97)
EXPERTS = dict(enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=32)

# name: (family, changes to the sizes above)
SHAPES = {
    "llama": ("Llama", SIZES | dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)),
    "qwen2": ("Qwen2", SIZES | dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)),
    "qwen3": (
        "Qwen3",
        SIZES | dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    ),
    "qwen3 untied": (
        "Qwen3",
        SIZES
        | dict(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            tie_word_embeddings=False,
        ),
    ),
    "gemma3": ("Gemma3", GEMMA | dict(num_hidden_layers=6, layer_types=PERIOD * 2, query_pre_attn_scalar=16)),
    "gemma3 27B": (  # another attention scale, a linear rope on full layers, a cap
        "Gemma3",
        GEMMA
        | dict(
            num_hidden_layers=7,
            query_pre_attn_scalar=21,
            final_logit_softcapping=2.0,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ),
    "gemma4 E2B": (
        "Gemma4",
        GEMMA4
        | PER_LAYER_INPUTS
        | dict(num_kv_shared_layers=3, use_double_wide_mlp=True, num_key_value_heads=1),
    ),
    "gemma4 E4B": ("Gemma4", GEMMA4 | PER_LAYER_INPUTS | dict(num_kv_shared_layers=2)),
    "gemma4 31B": ("Gemma4", GEMMA4 | dict(attention_k_eq_v=True, num_global_key_value_heads=1)),
    "gemma4 26B": (
        "Gemma4",
        GEMMA4 | EXPERTS | dict(num_hidden_layers=3, layer_types=PERIOD, attention_k_eq_v=True),
    ),
    "gemma4 12B": (
        "Gemma4Unified",
        {key: value for key, value in GEMMA4.items() if key != "hidden_size_per_layer_input"}
        | dict(attention_k_eq_v=True, num_global_key_value_heads=1),
    ),
}


def config_of(name, **changes):
    family, sizes = SHAPES[name]
    kind = "TextConfig" if family.startswith("Gemma") else "Config"
    tied = dict(tie_word_embeddings=True, initializer_range=0.1)
    return getattr(transformers, family + kind)(**(tied | sizes | changes))


def make(name, seed=0, **changes):
    """A model whose gains are not 1 and whose logits are far from uniform. Attention without a scale makes
    deep random models chaotic, as no trained one is, unless the norms of queries and keys are small."""
    torch.manual_seed(seed)
    family, _ = SHAPES[name]
    model = getattr(transformers, family + "ForCausalLM")(config_of(name, **changes)).eval()
    offset = 1.0 if family == "Gemma3" else 0.0
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "q_norm" in key or "k_norm" in key:
                small = family.startswith("Gemma4")
                tensor.uniform_(0.2 - offset, 0.5 - offset) if small else tensor.uniform_(
                    0.5 - offset, 1.5 - offset
                )
            elif "norm" in key:
                tensor.uniform_(0.5 - offset, 1.5 - offset)
            elif key.endswith(("layer_scalar", "scale")):
                tensor.uniform_(0.5, 1.2)
            elif key.endswith("bias"):
                tensor.uniform_(-1, 1)
            elif ".experts." in key:
                tensor.normal_(0, 0.1)
    return model


def tokens_for(model, batch=2, length=29, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
