"""MLX's own arithmetic, and mlx-lm's loader."""

from __future__ import annotations

import json
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np

NAME = "MLX"


def version() -> str:
    return f"mlx {installed('mlx')}, mlx-lm {installed('mlx-lm')}"


def compare(path: Path, filled, grid: str) -> tuple[int, int, int]:
    """Codes, scale parameters and decoded weights in which MLX differs from the checkpoint."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    stored = {}
    for shard in sorted(path.glob("*.safetensors")):
        stored |= mx.load(str(shard))
    config = json.loads((path / "config.json").read_text())["quantization"]
    codes = scales = values = 0
    for key in filled.latents:
        module = key.removesuffix(".weight")
        entry = config.get(module, config)
        form = {"group_size": entry["group_size"], "bits": entry["bits"]}
        packed, factor, bias = (stored[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        expected = filled.checkpoint.quantized[key]
        ones = mx.ones(factor.shape, mx.float32)
        code = mx.dequantize(packed, ones, mx.zeros(factor.shape, mx.float32), **form)
        lowest = -128 if form["bits"] == 8 else 0
        codes += int(np.count_nonzero(np.array(code, copy=False) + lowest != expected.codes.numpy()))
        pair = np.stack([np.array(part.astype(mx.float32)) for part in (factor, bias)], axis=-1)
        scales += _differing(pair, expected.scales.numpy())
        decoded = mx.dequantize(packed, factor, bias, **form).astype(mx.float32)
        values += _differing(np.array(decoded), filled.checkpoint.weight(key).numpy())
    return codes, scales, values


def _differing(one: np.ndarray, other: np.ndarray) -> int:
    one, other = (np.ascontiguousarray(part, np.float32).view(np.uint32) for part in (one, other))
    return int(np.count_nonzero(one != other))


def score(path: Path, tokens: list[int]) -> list[float]:
    """Every log p(token | before), computed by mlx-lm."""
    import mlx.core as mx
    from mlx_lm import load

    mx.set_default_device(mx.cpu)
    model, _ = load(str(path))
    logits = model(mx.array([tokens]))[0, :-1].astype(mx.float32)
    logarithms = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logarithms, mx.array(tokens[1:])[:, None], axis=-1)
    return np.array(chosen[:, 0]).tolist()
