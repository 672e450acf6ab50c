"""A Hugging Face folder as transformers sees it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import torch

import libqat

NAME = "transformers"


def version() -> str:
    return f"transformers {installed('transformers')}, compressed-tensors {installed('compressed-tensors')}"


def _load(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with _joined_experts():
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))  # compressed-tensors unpacks a weight when it is used first
    return model


@contextmanager
def _joined_experts() -> Iterator[None]:
    """Lends transformers the rule that it lacks for Gemma 4; see docs/formats/compressed-tensors.md."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    halves = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]
    joins = [
        WeightConverter(halves, "experts.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter("experts.*.down_proj.weight", "experts.down_proj", [MergeModulelist(dim=0)]),
    ]
    register_checkpoint_conversion_mapping("gemma4_text", joins, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping("gemma4_text", [], overwrite=True)


def _weight(model: torch.nn.Module, key: str) -> torch.Tensor:
    """What the model computes with."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    if name == "weight" and hasattr(module, "weight_scale") and hasattr(module, "_dequantize_weights"):
        return (
            module._dequantize_weights()
        )  # the mobile loader's linear; its embedding has a property `weight`
    return getattr(module, name)


def differing(path: Path, weights: dict[str, torch.Tensor]) -> int:
    """Numbers that transformers computes with and that are not those of `weights`, bit for bit."""
    model, count = _load(path), 0
    for key, weight in weights.items():
        pair = [part.detach().float().numpy() for part in (_weight(model, key), weight)]
        found, expected = (np.ascontiguousarray(part).view(np.uint32) for part in pair)
        count += int(np.count_nonzero(found != expected))
    return count


def top1(path: Path, decoder: libqat.Decoder, tokens: torch.Tensor) -> tuple[int, int]:
    """(positions where transformers' likeliest token is libqat's, positions)."""
    with torch.no_grad():
        ours = decoder(tokens[None])[0].argmax(-1)
        theirs = _load(path)(tokens[None]).logits[0].argmax(-1)
    return int((ours == theirs).sum()), len(tokens)
