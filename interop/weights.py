"""Weights for the comparison: random rows of every magnitude, and rows that should break a quantizer."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import numpy as np
import torch

import libqat
from libqat import _core

HIDDEN = 256
"""Width of gate and up: a multiple of every block."""
NARROW = 64
"""The same for grids with one scale a row: a million short rows are quicker than long ones."""
PATTERN_EVERY = 61
"""Each row of this number holds an adversarial pattern."""


class Filled(NamedTuple):
    """A checkpoint whose three MLP matrices are on one grid, and their latents."""

    checkpoint: libqat.QuantizedCheckpoint
    latents: dict[str, torch.Tensor]
    blocks: int


def fill(grid: str, blocks: int, smallest: float = 0.0, largest: float = math.inf, seed: int = 0) -> Filled:
    """A one-layer Llama with at least `blocks` blocks of `grid` in its MLP.

    Adversarial rows whose largest magnitude is neither 0 nor from `smallest` to `largest` are left out.
    """
    block = _core.grid_info(grid)["block"]
    hidden = HIDDEN if block else NARROW
    intermediate = _intermediate(block, hidden, blocks)
    generator = np.random.default_rng(seed)
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    latents = {
        f"model.layers.0.mlp.{name}.weight": torch.from_numpy(rows(generator, *shape, smallest, largest))
        for name, shape in shapes.items()
    }
    tensors = [*_frame(generator, hidden), *latents.items()]
    checkpoint = _core.freeze_tensors(
        tensors, dict.fromkeys(latents, grid), config=_config(hidden, intermediate), tokenizer="none"
    )
    counted = sum(checkpoint.quantized[key].scales[..., 0].numel() for key in latents)
    return Filled(checkpoint, latents, counted)


def _intermediate(block: int | None, hidden: int, blocks: int) -> int:
    """Rows of gate and up, a multiple of `hidden`."""
    per_row = hidden / block if block else 1
    return math.ceil(blocks / ((3 if block else 2) * per_row) / hidden) * hidden


def rows(
    generator: np.random.Generator, count: int, width: int, smallest: float, largest: float
) -> np.ndarray:
    """float32[count, width]."""
    scale = np.exp2(generator.uniform(-8, 3, (count, 1))).astype(np.float32)
    values = generator.standard_normal((count, width), np.float32) * scale
    patterns = [
        row
        for row, peak in ((row, np.abs(row).max()) for row in adversarial(generator, width))
        if peak == 0 or smallest <= peak <= largest
    ]
    for number, row in enumerate(range(0, count, PATTERN_EVERY)):
        values[row] = patterns[number % len(patterns)]
    return values


def adversarial(generator: np.random.Generator, width: int) -> list[np.ndarray]:
    """Rows float32[width]: zeros, one huge weight, subnormals, ties, constants, alternating signs."""
    index = np.arange(width)
    zero = np.zeros(width, np.float32)
    huge = generator.standard_normal(width).astype(np.float32)
    huge[width // 3] = 6e4
    alone = zero.copy()
    alone[-1] = -1.0
    return [
        zero,
        -zero,
        huge,
        alone,
        np.float32(1e-41) * (index % 7 - 3).astype(np.float32),
        np.float32(2.0**-20) * generator.standard_normal(width).astype(np.float32),
        ((index % 32) - 16).astype(np.float32) / 2,
        ((index % 16) - 7.5).astype(np.float32) * np.float32(2.0**-5),
        np.full(width, 0.3, np.float32),
        np.full(width, -0.3, np.float32),
        np.where(index % 2 == 0, 1.5, -1.5).astype(np.float32),
        np.abs(generator.standard_normal(width)).astype(np.float32) + 10,
    ]


def _frame(generator: np.random.Generator, hidden: int) -> list[tuple[str, torch.Tensor]]:
    """The float tensors around the MLP: multiples of 1/512 that bfloat16 and float16 hold exactly."""
    layer = "model.layers.0."
    shapes = {"model.embed_tokens": (64, hidden)}
    shapes |= {f"{layer}self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    tensors = [
        (f"{name}.weight", torch.from_numpy(generator.integers(-64, 64, shape).astype(np.float32) / 512))
        for name, shape in shapes.items()
    ]
    norms = [f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"]
    return tensors + [(f"{name}.weight", torch.ones(hidden)) for name in norms]


def _config(hidden: int, intermediate: int) -> str:
    return json.dumps(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 64,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": hidden // 4,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    )
