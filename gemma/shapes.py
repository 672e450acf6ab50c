"""Tiny random models of every shape, made by transformers, and the text that they are trained on.

The shapes are those of the published models: which layers slide, whose keys are shared, what is wide. The
sizes are as small as the formats allow: rows of whole blocks of 32 weights.
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


def make(shape: Shape, seed: int = 0) -> torch.nn.Module:
    """A model in float32 whose gains and scalars are not 1, so that a mistake in them shows."""
    torch.manual_seed(seed)
    config_name = shape.kind + ("TextConfig" if shape.kind.startswith("Gemma") else "Config")
    config = getattr(transformers, config_name)(**shape.settings)
    model = getattr(transformers, f"{shape.kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            _randomize(name, value, shape.family)
    return model


def _randomize(name: str, value: torch.Tensor, family: str) -> None:
    """Norms of queries and keys stay small where nothing else divides their product, as in published models:
    attention would otherwise pick single tokens, and a rounding change which.
    """
    if name.endswith(("q_norm.weight", "k_norm.weight")) and family == "gemma4":
        value.uniform_(0.3, 0.6)
    elif name.endswith("norm.weight") or "layernorm" in name:
        value.add_(torch.empty_like(value).uniform_(-0.3, 0.3))
    elif name.endswith("router.proj.weight"):
        value.normal_(std=0.5)  # clear choices of experts
    elif name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
        value.uniform_(0.7, 1.1)


def topics() -> list[str]:
    """Python's language reference, which every installation has."""
    found = pydoc_data.topics.topics
    return [found[name] for name in sorted(found)]


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of SmolLM2's kind with VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics()[:8], trainer)
    return tokenizer
