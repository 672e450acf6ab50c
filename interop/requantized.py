"""A Hugging Face folder of dequantized weights, quantized again by ggml as llama-quantize does."""

from __future__ import annotations

from pathlib import Path

import ggml
import numpy as np
import transformers_cpu

from libqat import _core

NAME = "HF safetensors, requantized by ggml"
version = ggml.version


def compare(path: Path, filled, grid: str) -> tuple[int, int, int]:
    """Blocks whose codes or scales requantization changes, and weights that then decode to other numbers."""
    kind = ggml.kind_of(grid)
    stored = transformers_cpu.stored(path)
    codes = scales = values = 0
    for key in filled.latents:
        tensor = filled.checkpoint.quantized[key]
        packed = _core.ggml_pack(grid, tensor.codes.numpy(), tensor.scales.numpy())
        again = ggml.quantize(kind, np.ascontiguousarray(stored[key].float().numpy()))
        found = ggml.differing_blocks(packed.reshape(-1), again, kind, grid)
        codes, scales = codes + found[0], scales + found[1]
        decoded = ggml.dequantize(kind, again, stored[key].numel())
        values += ggml.differing(decoded, filled.checkpoint.weight(key).numpy().reshape(-1))
    return codes, scales, values
