"""One row: parity, a short QAT, the exported file, and what its consumer makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import folder
import gguf_file
import parity
import shapes
import torch
from libqat.html_report import read_telemetry

import libqat
from libqat import _core, data, finetune

STEPS = 60
LENGTH = 64
AVERAGED = 5
"""Steps at either end whose mean loss is told."""
JUDGED = 64
"""Tokens whose successors the consumer is asked for."""


class Export(NamedTuple):
    """A way out: the grids, the target, the consumer."""

    target: str
    consumer: ModuleType
    rules: tuple[tuple[str, str], ...]
    """(expression of module names, grid); what no rule matches stays float."""

    @property
    def policy(self) -> dict[str, Any]:
        return {
            "rules": [
                {"match": match, "weight": grid, **({} if match == _ATTENTION else {"optional": True})}
                for match, grid in self.rules
            ]
        }


_ATTENTION = r".*self_attn\.[qkvo]_proj"
EXPORTS = (
    Export(
        "gguf",
        gguf_file,
        (
            (".*embed_tokens", "q8_0"),
            (".*embed_tokens_per_layer", "q4_0"),
            (_ATTENTION, "q4_0"),
            (r".*mlp\..*_proj", "q4_0"),
            (r".*experts\.(gate_up|down)_proj", "q4_0"),
            (r".*per_layer_(input_gate|projection)", "q8_0"),
            (r".*per_layer_model_projection", "bf16"),
        ),
    ),
    Export(
        "gemma-mobile",
        folder,
        (
            (".*embed_tokens", "mobile4"),
            (".*embed_tokens_per_layer", "mobile4"),
            (_ATTENTION, "mobile4"),
            (r".*layers\.[01]\.mlp\..*_proj", "mobile4"),
            (r".*mlp\..*_proj", "mobile2"),
            (r".*per_layer_(input_gate|projection)", "mobile8"),
        ),
    ),
    Export(
        "compressed-tensors",
        folder,
        (
            (_ATTENTION, "int4_g32"),
            (r".*mlp\..*_proj", "int4_g32"),
            (r".*experts\.(gate_up|down)_proj", "int4_g32"),
        ),
    ),
)


def rows(shape: shapes.Shape, out: Path) -> list[dict[str, Any]]:
    """The rows of a shape, one for each way out."""
    place = out / shape.key
    shutil.rmtree(place, ignore_errors=True)
    source = place / "float"
    source.mkdir(parents=True)
    tokenizer = shapes.make_tokenizer(shapes.topics()[:8])
    reference = shapes.make(shape)
    reference.save_pretrained(source)
    tokenizer.save(str(source / "tokenizer.json"))
    tokens = data.tokenize(tokenizer, shapes.topics()[8:40])
    agreement = parity.compare(
        reference, libqat.load_model(source).decoder, tokens[: 4 * LENGTH].view(4, LENGTH)
    )
    return [_row(shape, way, source, tokens, place) | agreement for way in EXPORTS]


def _row(shape: shapes.Shape, way: Export, source: Path, tokens: torch.Tensor, place: Path) -> dict[str, Any]:
    run = place / way.target / "run"
    options = {"steps": STEPS, "batch_size": 8, "sequence_length": LENGTH, "learning_rate": 3e-4}
    loop = finetune.start(
        source, tokens, way.policy, run, start="none", frozen=[], compute_dtype="float32", **options
    )
    loop.train()
    losses = [step["loss"] for step in read_telemetry(run / "telemetry.jsonl")]
    checkpoint = libqat.load(loop.checkpoint)
    path = place / way.target / ("model.gguf" if way.target == "gguf" else "folder")
    libqat.export(checkpoint, path, target=way.target, tokenizer_from=source)
    weights = _core.dequantize(checkpoint)
    weights.pop("lm_head.weight", None)  # tied
    decoder = libqat.open_model(loop.checkpoint).decoder
    same, positions = way.consumer.top1(path, decoder, tokens[-JUDGED:])
    return {
        "family": shape.family,
        "shape": shape.name,
        "qat_loss_first": sum(losses[:AVERAGED]) / AVERAGED,
        "qat_loss_last": sum(losses[-AVERAGED:]) / AVERAGED,
        "export": way.target,
        "grids": sorted(set(checkpoint.grids.values())),
        "consumer": way.consumer.NAME,
        "consumer_version": way.consumer.version(),
        "weights": sum(weight.numel() for weight in weights.values()),
        "differing_values": way.consumer.differing(path, weights),
        "top1_equal": same == positions,
        "top1_positions": positions,
        "policy": json.dumps(way.policy),
    }
