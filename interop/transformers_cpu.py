"""transformers on the CPU: the compressed-tensors and the Gemma mobile loaders."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import torch

NAME = "transformers"


def version() -> str:
    return f"transformers {installed('transformers')}, compressed-tensors {installed('compressed-tensors')}"


def load(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def score(path: Path, tokens: list[int]) -> list[float]:
    """Every log p(token | before), computed by transformers in the model's own dtype."""
    with torch.no_grad():
        logits = load(path)(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """Numbers that are not the same bit for bit, both as float32."""
    pair = (np.ascontiguousarray(part.detach().float().numpy()).view(np.uint32) for part in (one, other))
    return int(np.count_nonzero(next(pair) != next(pair)))


def compare(path: Path, filled, grid: str) -> tuple[int, int, int]:
    """Codes, scales and weights in which transformers differs from the checkpoint."""
    mobile = grid.startswith("mobile")
    model = load(path)
    if not mobile:
        with torch.no_grad():
            model(torch.tensor([[1, 2]]))  # compressed-tensors unpacks a weight when it is used first
    modules = dict(model.named_modules())
    tensors = {} if mobile else stored(path)
    codes = scales = values = 0
    for key in filled.latents:
        name = key.removesuffix(".weight")
        expected = filled.checkpoint.quantized[key]
        if mobile:
            found, factor, weight = _mobile(modules[name])
        else:
            found, factor = _packed(tensors, name, libqat_bits(grid))
            weight = modules[name].weight
        codes += int((found != expected.codes).sum())
        scales += differing(factor.reshape(-1), expected.scales.reshape(-1))
        values += differing(weight.detach(), filled.checkpoint.weight(key))
    return codes, scales, values


def libqat_bits(grid: str) -> int:
    """Of an integer grid's name: "int4_g32" -> 4."""
    return int(grid.removeprefix("int")[0])


def _mobile(module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from transformers.integrations import gemma_quant

    unpack = {2: gemma_quant._unpack_int2, 4: gemma_quant._unpack_int4}.get(module.num_bits)
    codes = module.weight if unpack is None else unpack(module.weight, module.in_features)
    return codes, module.weight_scale, module._dequantize_weights()


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    from safetensors.torch import load_file

    tensors = {}
    for shard in sorted(path.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def _packed(tensors: dict[str, torch.Tensor], name: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    return unpack_from_int32(tensors[f"{name}.weight_packed"], bits, shape), tensors[f"{name}.weight_scale"]
