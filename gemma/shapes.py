"""Tiny random models of every shape, made by transformers, and the text that they are trained on.

The shapes are those of the published models: which layers slide, whose keys are shared, what is wide. The
sizes are as small as the formats allow: rows of whole blocks of 32 weights. The tests take the same shapes,
some of them in other sizes.
"""

from __future__ import annotations

import pydoc_data.topics
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 512
SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA = SIZES | {"head_dim": 32, "sliding_window": 16}
GEMMA4 = GEMMA | {"global_head_dim": 64, "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0}
UNIFIED = {key: value for key, value in GEMMA4.items() if key != "hidden_size_per_layer_input"}
SHARED = {
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
}
KEYS_ARE_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
FIVE = [SLIDING, SLIDING, FULL, SLIDING, FULL]
FOUR = [SLIDING, FULL, SLIDING, FULL]


class Shape(NamedTuple):
    """One row of models."""

    family: str
    name: str
    """Of the published model that has this shape."""
    kind: str
    """transformers' name: `{kind}ForCausalLM`."""
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.family}-{self.name}".lower().replace(" ", "-")


def _layers(types: list[str]) -> dict[str, Any]:
    return {"layer_types": types, "num_hidden_layers": len(types)}


SHAPES = (
    Shape("llama", "SmolLM2", "Llama", SIZES | {"num_hidden_layers": 3}),
    Shape("qwen3", "0.6B", "Qwen3", SIZES | {"num_hidden_layers": 3, "head_dim": 32}),
    Shape("gemma3", "270M", "Gemma3", GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 32}),
    Shape(
        "gemma4",
        "E2B",
        "Gemma4",
        GEMMA4 | SHARED | _layers(FIVE) | {"use_double_wide_mlp": True, "num_key_value_heads": 1},
    ),
    Shape("gemma4", "E4B", "Gemma4", GEMMA4 | SHARED | _layers(FIVE)),
    Shape("gemma4", "12B", "Gemma4Unified", UNIFIED | KEYS_ARE_VALUES | _layers(FOUR)),
    Shape("gemma4", "26B-A4B", "Gemma4", GEMMA4 | KEYS_ARE_VALUES | EXPERTS | _layers(FOUR)),
    Shape("gemma4", "31B", "Gemma4", GEMMA4 | KEYS_ARE_VALUES | {"num_attention_heads": 8} | _layers(FOUR)),
)


BY_KEY = {shape.key: shape for shape in SHAPES}


def resized(shape: Shape, **sizes: Any) -> Shape:
    """The shape with other values of those settings that it has."""
    known = {name: value for name, value in sizes.items() if name in shape.settings}
    return shape._replace(settings=shape.settings | known)


def config_of(shape: Shape, **changes: Any) -> transformers.PretrainedConfig:
    """Its configuration, with further settings."""
    name = shape.kind + ("TextConfig" if shape.kind.startswith("Gemma") else "Config")
    return getattr(transformers, name)(**(shape.settings | changes))


def fresh(shape: Shape, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model in float32 as transformers initializes it."""
    torch.manual_seed(seed)
    return getattr(transformers, f"{shape.kind}ForCausalLM")(config_of(shape, **changes)).float().eval()


def make(shape: Shape, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model in float32 whose gains and scalars are not 1, so that a mistake in them shows."""
    return randomize(fresh(shape, seed, **changes))


@torch.no_grad()
def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """What is constant in a new model.

    Norms of queries and keys stay small where nothing else divides their product, as in published models:
    attention would otherwise pick single tokens, and a rounding change which.
    """
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("q_norm.weight", "k_norm.weight")) and "gemma4" in model.config.model_type:
            value.uniform_(0.3, 0.6)
        elif name.endswith("norm.weight") or "layernorm" in name:
            value.add_(torch.empty_like(value).uniform_(-0.3, 0.3))
        elif name.endswith("router.proj.weight"):
            value.normal_(std=0.5)  # clear choices of experts, which a rounding of its input does not change
        elif name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
            value.uniform_(0.7, 1.1)
    return model


def topics() -> list[str]:
    """Python's language reference, which every installation has."""
    found = pydoc_data.topics.topics
    return [found[name] for name in sorted(found)]


def make_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE of SmolLM2's kind with `vocabulary` tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
