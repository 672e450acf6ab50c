"""Rounding an encoder under a policy, training it against its float self, and reading it back."""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import libqat
from libqat import _core

from .sentences import pooled, tokenized

Batch = dict[str, Tensor]
Progress = Callable[[int, int, str], None]
"""(done, total, note)."""

POOL = 64
"""Batches whose sentences are sorted by length together: little padding, and still mixed."""


@dataclass(frozen=True)
class Training:
    """Settings that all policies share."""

    steps: int
    batch_size: int
    seed: int


def batches(tokenizer, texts: list[str], options: Training) -> list[Batch]:
    """One batch per step; the texts repeat when they run out."""
    generator = torch.Generator().manual_seed(options.seed)
    result: list[Batch] = []
    size = options.batch_size
    while len(result) < options.steps:
        order = torch.randperm(len(texts), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, POOL * size):
            pool = sorted(order[start : start + POOL * size], key=lambda i: len(texts[i]))
            parts = [pool[at : at + size] for at in range(0, len(pool) - size + 1, size)]
            mixed = torch.randperm(len(parts), generator=generator).tolist()
            result += [tokenized(tokenizer, [texts[i] for i in parts[part]]) for part in mixed]
    return result[: options.steps]


def compute() -> torch.autocast | nullcontext:
    """bfloat16 matrix products where this CPU has them, as libqat's own trainer decides."""
    bfloat16 = _core.compute_dtype("auto") == "bfloat16"
    return torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()


@torch.no_grad()
def token_vectors(teacher: nn.Module, steps: list[Batch], progress: Progress) -> list[Tensor]:
    """The float model's token vectors on each batch, float16: all policies learn from them."""
    vectors = []
    for batch in steps:
        with compute():
            vectors.append(teacher(**batch).last_hidden_state.half())
        progress(len(vectors), len(steps), "")
    return vectors


def relative_error(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error of the token vectors, relative to their size; padding does not count."""
    weight = mask[..., None].float()
    error = ((hidden.float() - target.float()).square() * weight).sum()
    return error / (target.float().square() * weight).sum()


def train(
    prepared: libqat.PreparedModel,
    steps: list[Batch],
    targets: list[Tensor],
    learning_rate: float,
    scale_rate: float,
    progress: Progress,
) -> None:
    """AdamW on everything but the embedding tables, one step per batch.

    scale_rate: of learned scales, a step's share of a tensor's mean scale.
    The model stays in evaluation mode: dropout would only blur what the float model says.
    """
    model = prepared.model
    model.embeddings.requires_grad_(False)
    model.embeddings.LayerNorm.requires_grad_(True)
    groups = libqat.parameter_groups(prepared, learning_rate, scale_rate)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(steps)))
    for step, (batch, target) in enumerate(zip(steps, targets, strict=True), start=1):
        with compute():
            hidden = model(**batch).last_hidden_state
        loss = relative_error(hidden, target, batch["attention_mask"])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, len(steps), f"error {loss.item():.4f}")


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first tenth, then a half cosine down to a twentieth."""
    return min(1.0, (step + 1) / (0.1 * steps)) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


def attach(model: nn.Module, policy: Mapping, scale: str = "reference") -> libqat.PreparedModel:
    """A prepared copy of the model. scale: the grid's own rule or, from searched ones on, "learned"."""
    estimator = {"kind": "ste", "scale": scale}
    return libqat.prepare(copy.deepcopy(model), {**policy, "estimator": estimator})


def sentence_vectors(model: nn.Module, batch: Batch) -> Tensor:
    """What the model is used for, float32[N, D], differentiable."""
    with compute():
        hidden = model(**batch).last_hidden_state
    return pooled(hidden.float(), batch["attention_mask"])


def guide(prepared: libqat.PreparedModel, steps: list[Batch], progress: Progress) -> None:
    """Rounds the linears so that the sentence vectors err least; no training.

    A token counts as much as its sentence's vector depends on it: padding does not count at all.
    """
    layers = prepared.model.encoder.layer
    libqat.guided(prepared, steps, forward=sentence_vectors, blocks=layers, progress=progress)


def ship(prepared: libqat.PreparedModel, path: Path) -> nn.Module:
    """Writes the checkpoint and returns an ordinary model with the weights of that file.

    FileError unless each of them is the number that the prepared model computes with.
    """
    libqat.save(libqat.freeze(prepared), path)
    stored = dict(libqat.dequantize(libqat.load(path)))
    plain = libqat.unprepare(copy.deepcopy(prepared.model)).requires_grad_(False)
    plain.load_state_dict(stored)
    if differing := differing_values(prepared, plain):
        raise libqat.FileError(f"{path}: expected the trained weights, got {differing} other values")
    return plain


@torch.no_grad()
def differing_values(prepared: libqat.PreparedModel, plain: nn.Module) -> int:
    """How many weights of `plain` are not those that the prepared model's forward sees."""
    seen = dict(prepared.model.named_parameters())
    seen |= {slot.name: slot.layers[0][1].fake_quantized() for slot in prepared.slots}
    return sum(int((parameter != seen[name]).sum()) for name, parameter in plain.named_parameters())
