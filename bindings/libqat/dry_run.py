"""What a fine-tuning run would train, store, need and take, before it is begun."""

import math
import resource
import sys
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch

from . import _core, finetune
from ._core import Policy, StepReport

_MEASURED_STEPS = 2
"""The first step pays for allocations; the second is like all that follow."""


def dry_run(
    model: "str | PathLike",
    tokens: torch.Tensor,
    policy: "str | PathLike | Mapping | Policy",
    *,
    start: str | None = None,
    progress: Callable[[StepReport], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Takes two steps in memory and says what the whole run would amount to. Writes nothing.

    Arguments as in `finetune.start`; the time does not count its start, a few passes over the calibration
    tokens. The result, ready for JSON:
        tensors: [{"name", "shape", "grid", "trained", "bytes"}], bytes as they ship;
        grids: {grid: {"tensors", "weights", "bytes"}}; weights, trained_weights, bytes, bits_per_weight;
        memory: bytes of "latents", "gradients", "moments", and "peak", the most this process has held;
        time: "seconds_per_step", "tokens_per_second", "seconds" for the whole run, measured here and now;
        tokens: "per_step", "run", "text", and "epochs", how often the run reads the text.
    """
    policy, start, options = finetune.settled(policy, start, options)
    run = finetune.start(model, tokens, policy, "", start="none", **options)
    reports = _take_steps(run.trainer, progress)
    per_step = options["batch_size"] * options["sequence_length"] * options["accumulate"]
    seconds = _seconds_per_step(reports, per_step)
    return {
        "model": str(run.model),
        "start": start,
        **_sizes(run),
        "time": {
            "seconds_per_step": seconds,
            "tokens_per_second": per_step / seconds,
            "seconds": seconds * options["steps"],
        },
        "tokens": {
            "per_step": per_step,
            "run": per_step * options["steps"],
            "text": len(tokens),
            "epochs": per_step * options["steps"] / len(tokens),
        },
    }


def _sizes(run: finetune.Run) -> dict[str, Any]:
    parameters = run.loaded.decoder.parameters()
    trained = {name for name, value in parameters.items() if value.requires_grad}
    report = run.prepared.report()
    gradients = sum(parameters[name].nbytes for name in trained)
    weights = sum(math.prod(row.shape) for row in report)
    size = sum(row.bytes for row in report)
    return {
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "grid": row.grid,
                "trained": row.name in trained,
                "bytes": row.bytes,
            }
            for row in report
        ],
        "grids": _by_grid(report),
        "weights": weights,
        "trained_weights": sum(parameters[name].numel() for name in trained),
        "bytes": size,
        "bits_per_weight": 8 * size / weights,
        "memory": {
            "latents": sum(value.nbytes for value in parameters.values()),
            "gradients": gradients,
            "moments": 2 * gradients,
            "peak": _peak_bytes(),
        },
    }


def _take_steps(trainer: _core.Trainer, progress: Callable[[StepReport], Any] | None) -> list[StepReport]:
    reports: list[StepReport] = []

    def count(report: StepReport) -> bool:
        reports.append(report)
        if progress:
            progress(report)
        return len(reports) < _MEASURED_STEPS

    trainer.run(count)
    return reports


def _seconds_per_step(reports: list[StepReport], tokens: int) -> float:
    """Of the last step alone: `tokens_per_second` is the mean since the start."""
    elapsed = [report.step * tokens / report.tokens_per_second for report in reports]
    return elapsed[-1] - elapsed[-2] if len(elapsed) > 1 else elapsed[-1]


def _by_grid(report: list[_core.TensorReport]) -> dict[str, dict[str, int]]:
    grids: dict[str, dict[str, int]] = {}
    for row in report:
        grid = grids.setdefault(row.grid, {"tensors": 0, "weights": 0, "bytes": 0})
        grid["tensors"] += 1
        grid["weights"] += math.prod(row.shape)
        grid["bytes"] += row.bytes
    return grids


def _peak_bytes() -> int:
    """The operating system's count, in KiB on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


__all__ = ["dry_run"]
