"""A short QAT run of a real model through one policy, exported and scored in its consumer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from libqat.cli import console

import libqat
from libqat import _core, finetune

WINDOW = 256
BATCH = 2


class Case(NamedTuple):
    """One policy on its way to one consumer."""

    name: str
    policy: str | dict
    target: str
    score: Callable[[Path, list[int]], list[float]]
    """(exported file or folder, tokens) -> log p(token | before) of every token but the first."""


def run(
    case: Case, source: Path, training: torch.Tensor, judged: torch.Tensor, out: Path, steps: int
) -> dict:
    """Trains, exports, verifies, scores: the row of the trained table."""
    folder = out / case.name
    loop = finetune.start(
        source,
        training,
        case.policy,
        folder / "run",
        resume=(folder / "run" / "state.safetensors").exists(),
        steps=steps,
        batch_size=BATCH,
        sequence_length=WINDOW,
        learning_rate=1e-4,
        objective={"kl": 1.0, "ce": 0.0},
        frozen=[
            *finetune.FROZEN,
            ".*norm",
        ],  # which are bfloat16 in the original: a bfloat16 model keeps them
        seed=0,
    )
    with console.progress(f"{case.name}: training") as update:
        loop.train(lambda report: update(report.step, report.steps, console.describe(report)))
    checkpoint = libqat.load(loop.checkpoint)
    exported = folder / ("model.gguf" if case.target == "gguf" else case.target)
    options = {} if case.target == "gguf" else {"overwrite": True}
    libqat.export(checkpoint, exported, target=case.target, **options)
    differences = libqat.verify(exported, checkpoint)
    console.say(f"{case.name}: scoring in the consumer")
    theirs = case.score(exported, judged.tolist())
    return {
        "policy": case.name,
        "target": case.target,
        "steps": steps,
        "tokens": len(theirs),
        "differences": len(differences),
        "bits_per_weight": bits_per_weight(checkpoint),
        "ppl_float": perplexity(nll(source, judged)),
        "ppl_ptq": perplexity(nll(rounded(source, case.policy, folder / "ptq.qat.safetensors"), judged)),
        "ppl_qat": perplexity(nll(loop.checkpoint, judged)),
        "ppl_consumer": math.exp(-sum(theirs) / len(theirs)),
        "largest_difference": max(
            abs(a - b) for a, b in zip(theirs, log_probabilities(loop.checkpoint, judged), strict=True)
        ),
    }


def rounded(source: Path, policy: str | dict, path: Path) -> Path:
    """The same grids without training, by the consumer's own rule."""
    loaded = libqat.load_model(source)
    rule = (
        libqat.Policy.load(policy) if isinstance(policy, str) else libqat.Policy.from_json(json.dumps(policy))
    )
    plain = json.loads(rule.to_json()) | {"estimator": {"kind": "ste"}}
    prepared = libqat.prepare(loaded.decoder, plain)
    libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), path)
    return path


def log_probabilities(path: Path, tokens: torch.Tensor) -> list[float]:
    """Of libqat's own decoder in float32."""
    decoder = libqat.open_model(path, path.stem).decoder
    with torch.no_grad():
        logits = decoder(tokens[None])[0, :-1].float()
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].tolist()


def nll(path: Path, tokens: torch.Tensor) -> float:
    found = log_probabilities(path, tokens)
    return -sum(found) / len(found)


def perplexity(loss: float) -> float:
    return math.exp(loss)


def bits_per_weight(checkpoint: libqat.QuantizedCheckpoint) -> float:
    """Of all tensors, stored codes, scales and floats together."""
    bits = weights = 0.0
    for tensor in checkpoint.quantized.values():
        rows, width = tensor.codes.shape
        weights += rows * width
        bits += 8 * rows * _core.grid_row_bytes(tensor.grid, width)
    for tensor in checkpoint.floats.values():
        weights += tensor.numel()
        bits += 8 * tensor.nbytes
    return bits / weights
