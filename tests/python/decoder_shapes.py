"""Small random models of every shape that libqat's decoder knows, made by transformers.

Narrower than the tiny models of `make gemma`, since no format has to take them; odd numbers where a mistake
could hide behind a power of two; and variants that no published model has.
"""

import shapes
import torch
from shapes import FULL, SLIDING

SIZES = dict(
    vocab_size=97,
    vocab_size_per_layer_input=97,
    intermediate_size=96,
    max_position_embeddings=128,
    head_dim=16,
    global_head_dim=32,
    sliding_window=8,
    num_experts=5,
    moe_intermediate_size=32,
)
PERIOD = dict(layer_types=[SLIDING, SLIDING, FULL], num_hidden_layers=3)
TWO_PERIODS = dict(layer_types=[SLIDING, SLIDING, FULL] * 2, num_hidden_layers=6)


def narrow(key, **changes):
    shape = shapes.resized(shapes.BY_KEY[key], **SIZES)
    return shape._replace(settings=shape.settings | changes)


LLAMA = narrow("llama-smollm2", pad_token_id=None)
SHAPES = {
    "llama": LLAMA,
    "qwen2": LLAMA._replace(kind="Qwen2"),
    "qwen3": narrow("qwen3-0.6b", pad_token_id=None, head_dim=32),
    "qwen3 untied": narrow(
        "qwen3-0.6b",
        pad_token_id=None,
        num_hidden_layers=2,
        num_key_value_heads=4,
        head_dim=8,
        tie_word_embeddings=False,
    ),
    "gemma3": narrow("gemma3-270m", query_pre_attn_scalar=16, **TWO_PERIODS),
    "gemma3 27B": narrow(  # another attention scale, a linear rope on full layers, a cap
        "gemma3-270m",
        query_pre_attn_scalar=21,
        final_logit_softcapping=2.0,
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma4 E2B": narrow("gemma4-e2b", num_kv_shared_layers=3, **TWO_PERIODS),
    "gemma4 E4B": narrow("gemma4-e4b", **TWO_PERIODS),
    "gemma4 31B": narrow("gemma4-31b", num_attention_heads=4, **TWO_PERIODS),
    "gemma4 26B": narrow("gemma4-26b-a4b", num_global_key_value_heads=None, **PERIOD),
    "gemma4 12B": narrow("gemma4-12b", **TWO_PERIODS),
}


def config_of(name, **changes):
    return shapes.config_of(SHAPES[name], **changes)


def make(name, seed=0, **changes):
    """A model whose gains are not 1 and whose logits are far from uniform. Attention without a scale makes
    deep random models chaotic, as no trained one is, unless the norms of queries and keys are small."""
    kind = SHAPES[name].kind
    model = shapes.fresh(SHAPES[name], seed, **changes)
    offset = 1.0 if kind == "Gemma3" else 0.0
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "q_norm" in key or "k_norm" in key:
                small = kind.startswith("Gemma4")
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
