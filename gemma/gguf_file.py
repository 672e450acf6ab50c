"""A GGUF as its consumers see it: values by the package `gguf`, the likeliest tokens by llama.cpp."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path

import gguf
import numpy as np
import torch

import libqat
from libqat import llama_cpp

NAME = "llama.cpp"
MARGIN = 0.25
"""llama.cpp rounds inputs of products to 8 bits, an error of 0.5 % of each: over the 40 products of these
models some 3.5 % of the logits' spread, and 5 % of it in the difference of two. Two tokens that lie within
five times that are no choice."""

# What the package's own table of names lacks.
_SPELLED = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "layer_scalar": "layer_output_scale.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


def version() -> str:
    return f"{llama_cpp.version()}, gguf {installed('gguf')}"


def differing(path: Path, weights: dict[str, torch.Tensor]) -> int:
    """Numbers of the file that are not those of `weights`, bit for bit, or are missing.

    The package decodes the file and says which name of transformers each tensor has.
    """
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    heads = {
        part: reader.fields[f"{arch}.attention.{key}"].contents()
        for part, key in (("q_proj", "head_count"), ("k_proj", "head_count_kv"))
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(arch, reader.fields[f"{arch}.block_count"].contents())
    count = 0
    for key, weight in weights.items():
        tensor = tensors.get(_gguf_name(key, names))
        if tensor is None:
            count += weight.numel()
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        expected = _as_stored(key, weight.float(), arch, heads).numpy()
        count += int((values.reshape(expected.shape).view(np.uint32) != expected.view(np.uint32)).sum())
    return count


def _names(arch: str, blocks: int):
    [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    return gguf.get_tensor_name_map(kind, blocks)


def _gguf_name(key: str, names) -> str | None:
    for ending, spelled in _SPELLED.items():
        if key.endswith(f".{ending}"):
            return f"blk.{key.split('.')[2]}.{spelled}"
    return names.get_name(key, try_suffixes=(".weight",))


def _as_stored(key: str, weight: torch.Tensor, arch: str, heads: dict[str, int]) -> torch.Tensor:
    """As llama.cpp's converter stores it: 1 added to Gemma 3's norms, llama's rotated rows in pairs."""
    if arch == "gemma3" and key.endswith("norm.weight"):
        return weight + 1
    count = heads.get(key.removesuffix(".weight").rpartition(".")[2])
    if arch == "llama" and count:
        rows, width = weight.shape
        return weight.view(count, 2, rows // count // 2, width).transpose(1, 2).reshape(rows, width)
    return weight


def top1(path: Path, decoder: libqat.Decoder, tokens: torch.Tensor) -> tuple[int, int]:
    """(positions where llama.cpp's likeliest token is libqat's, positions with a clear choice)."""
    with torch.no_grad():
        logits = decoder(tokens[None])[0].double()
    best = logits.topk(2).values
    clear = (best[:, 0] - best[:, 1] > MARGIN * logits.std()).tolist()
    with llama_cpp.LlamaCpp(path, context=len(tokens) + 8) as llama:
        listed = llama.likeliest(tokens.tolist())
    pairs = zip(listed, logits.argmax(-1).tolist(), clear, strict=True)
    same = [first == ours for [(first, _)], ours, is_clear in pairs if is_clear]
    return sum(same), len(same)
