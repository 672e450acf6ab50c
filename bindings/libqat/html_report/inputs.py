"""A run folder on disk: what was asked of the run, what it logged, and its weights before and after."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _core, run_folder
from .._core import ArgumentError, FileError, Policy
from ..run_folder import CHECKPOINT, EVALUATION, FINETUNE, RUN, STATE
from .evaluation import Evaluation, parse_evaluation
from .reading import Reader
from .tensors import Weight

TELEMETRY = "telemetry.jsonl"
_LATENTS = ("latent/", "average/")
"""Prefixes of the trained tensors in a state; a run that averages ships the average."""
_NUMBERS = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "flip_rate",
    "oscillation",
    "clip_rate",
    "scale_drift",
    "distance_to_grid",
    "probe_kl",
    "probe_kl_start",
)
_FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class RunFolder:
    """The small files of a finished run."""

    path: Path
    options: dict[str, Any]
    policy: Policy
    steps: list[dict[str, Any]]
    """telemetry.jsonl: what was measured at each step; evaluations as {"student": {}, "teacher": {}}."""
    source: Path | None
    """The float model; None when the run does not say."""
    texts: list[str]
    control: bool
    start: str
    """The PTQ method that training started from, or "none"."""
    version: str
    """Of the libqat that trained; "" when the run does not say."""
    evaluation: Evaluation | None

    @property
    def checkpoint(self) -> Path:
        """What ships."""
        return self.path / CHECKPOINT


def read_run(path: str | os.PathLike) -> RunFolder:
    """The small files of a run folder. FileError: missing, malformed, or unfinished."""
    folder = Path(path)
    run = Reader(run_folder.read_json(folder / RUN), str(folder / RUN))
    for name in (STATE, CHECKPOINT):
        if not (folder / name).is_file():
            raise FileError(
                f"report: {folder / name}: expected the file of a finished run, got none; "
                "libqat finetune ... --resume finishes it"
            )
    started = run_folder.read_finetune(folder) if (folder / FINETUNE).exists() else None
    evaluation = None
    if (folder / EVALUATION).exists():
        evaluation = parse_evaluation(run_folder.read_evaluation(folder), str(folder / EVALUATION))
    return RunFolder(
        path=folder,
        options=_core.check_options(**run.object("options").content),
        policy=Policy.from_json(json.dumps(run.object("policy").content)),
        steps=read_telemetry(folder / TELEMETRY),
        source=Path(started["model"]) if started else None,
        texts=list(map(str, started["text"])) if started else [],
        control=bool(started and started["control"]),
        start=started.get("start", "none") if started else "none",
        version=started["libqat"] if started else "",
        evaluation=evaluation,
    )


def read_telemetry(path: Path) -> list[dict[str, Any]]:
    """One entry per step. FileError for a line that is not an object of finite numbers."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"report: {path}: expected a readable text file, got {error}") from error
    return [_step(line, f"{path}: line {index}") for index, line in enumerate(lines, 1) if line.strip()]


def _step(line: str, source: str) -> dict[str, Any]:
    try:
        entry = Reader(json.loads(line), source)
    except (ValueError, RecursionError) as error:
        raise FileError(f"report: {source}: expected JSON, got {error}") from error
    step = {"step": entry.whole("step")}
    for name in _NUMBERS[1:]:
        if (value := entry.number_or_none(name)) is not None:
            step[name] = value
    if "evaluation" in entry.content:
        scores = entry.object("evaluation")
        step["evaluation"] = {
            name: {field: scores.object(name).number(field) for field in ("nll", "kl", "top1")}
            for name in ("student", "teacher")
            if name in scores.content
        }
    return step


@contextmanager
def weights_of(run: RunFolder, source: Path) -> Iterator[list[Weight]]:
    """Each parameter once, in the model's order, read from disk or memory as it is asked for.

    source: the float model that the run began with. ArgumentError when it has other parameters than the
    checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    original = _core.load_model(source).decoder.parameters()
    checkpoint = _core.load(run.checkpoint)
    _check_names(source, original, [*checkpoint.grids, *checkpoint.floats])
    try:
        with safe_open(run.path / STATE, framework="pt") as state:
            latents = {
                key.removeprefix(prefix): key
                for prefix in _LATENTS
                for key in state.keys()  # noqa: SIM118
                if key.startswith(prefix)
            }
            yield [
                _weight(name, tensor, checkpoint, state, latents.get(name))
                for name, tensor in original.items()
            ]
    except SafetensorError as error:
        raise FileError(f"report: {run.path / STATE}: expected a safetensors file, got {error}") from error


def _check_names(source: Path, original: dict[str, Tensor], shipped: list[str]) -> None:
    for name in sorted(original.keys() ^ set(shipped)):
        where = "the float model" if name in original else "the checkpoint"
        raise ArgumentError(
            f"report: {source}: expected the model that the run began with, got another: {name} is only in "
            f"{where}"
        )


def _weight(name: str, tensor: Tensor, checkpoint, state, key: str | None) -> Weight:
    latent = (lambda: state.get_tensor(key)) if key else (lambda: tensor)
    shape, trained = tuple(tensor.shape), key is not None
    if name in checkpoint.grids:
        quantized = checkpoint.quantized[name]
        return Weight(
            name, shape, quantized.grid, stored_bytes(quantized.grid, shape), trained, lambda: tensor, latent,
            lambda: (quantized.codes, quantized.scales),
        )  # fmt: skip
    shipped = checkpoint.floats[name]
    kind = _FLOATS.get(shipped.dtype, str(shipped.dtype).removeprefix("torch."))
    return Weight(name, shape, kind, shipped.nbytes, trained, lambda: tensor, latent, lambda: shipped)


def stored_bytes(grid: str, shape: tuple[int, ...]) -> int:
    """Codes and scales of a weight [R, ...] on a grid with codes."""
    return _core.grid_tensor_bytes(grid, shape[0], math.prod(shape[1:]))
