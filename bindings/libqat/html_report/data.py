"""Everything that a report says, gathered into plain objects before any of it is drawn."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import ops
from .._core import ArgumentError, FileError
from ..weight_quantizer import WeightQuantizer
from .evaluation import Evaluation, parse_evaluation
from .inputs import RunFolder, read_run, stored_bytes, weights_of
from .levels import OnGrid, on_grid
from .reproduce import command_of, policy_name, policy_text
from .tensors import TensorRow, Weight, has_codes, measure

SHOWN = 6
"""Tensors whose weights are drawn on their grid: those with the largest error."""

Progress = Callable[[int, int, str], Any]


@dataclass(frozen=True)
class ReportData:
    """What a report shows; `as_json` is the same for programs."""

    title: str
    version: str
    """Of the libqat that trained, or that wrote the report when the run does not say."""
    policy_name: str
    """A preset's name, or "" for a user's own."""
    policy: str
    """JSON."""
    tensors: list[TensorRow]
    worst: list[OnGrid]
    steps: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    command: str = ""
    run: str = ""
    """Path of the run folder, or "" for a model that was trained in a loop of the user's."""
    file: str = ""
    file_bytes: int | None = None
    control: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and text."""
        return asdict(self)


def gather_run(
    run: str | os.PathLike,
    model: str | os.PathLike | None = None,
    title: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> ReportData:
    """Reads a run folder. See `write_report`."""
    folder = read_run(run)
    source = _source(folder, model)
    with weights_of(folder, source) as weights:
        rows, worst = _measure_all(weights, progress)
    return ReportData(
        title=title or (source.name if source.is_dir() else source.stem),
        version=folder.version or _version(),
        policy_name="float (control)" if folder.control else policy_name(folder.policy),
        policy=policy_text(folder.policy),
        tensors=rows,
        worst=worst,
        steps=folder.steps,
        options=folder.options,
        evaluation=folder.evaluation,
        command=command_of(folder) if command is None else command,
        run=str(folder.path),
        file=folder.checkpoint.name,
        file_bytes=folder.checkpoint.stat().st_size,
        control=folder.control,
    )


def _source(folder: RunFolder, model: str | os.PathLike | None) -> Path:
    source = folder.source if model is None else Path(model)
    if source is None:
        raise ArgumentError(
            f"report: {folder.path}: expected the float model, as the run does not name it; "
            "pass model= (command line: --model)"
        )
    if not source.exists():
        raise FileError(
            f"report: {source}: expected the float model that the run began with, got nothing there; "
            "pass model= (command line: --model)"
        )
    return source


def gather_model(
    prepared: Any,
    original: Mapping[str, Tensor],
    *,
    title: str,
    telemetry: Sequence[Mapping[str, Any]] = (),
    evaluation: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> ReportData:
    """Reads a prepared torch model. See `write_model_report`."""
    from ..prepare import PreparedModel, prepared_root

    model = prepared_root(prepared)
    quantizers = PreparedModel(model).quantizers()
    learned = PreparedModel(model).scale_parameters()
    weights = [
        _weight(name, parameter, quantizers.get(name), learned.get(f"{name}_scales"), original)
        for name, parameter in model.named_parameters()
        if name not in learned
    ]
    rows, worst = _measure_all(weights, progress)
    policy = PreparedModel(model).policy
    return ReportData(
        title=title,
        version=_version(),
        policy_name=policy_name(policy),
        policy=policy_text(policy),
        tensors=rows,
        worst=worst,
        steps=[dict(step) for step in telemetry],
        options=dict(options or {}),
        evaluation=None if evaluation is None else parse_evaluation(dict(evaluation), "evaluation"),
        command=command,
    )


def _weight(
    name: str,
    parameter: nn.Parameter,
    quantizer: WeightQuantizer | None,
    scales: nn.Parameter | None,
    original: Mapping[str, Tensor],
) -> Weight:
    if name not in original or original[name].shape != parameter.shape:
        got = list(original[name].shape) if name in original else "no such tensor"
        raise ArgumentError(f"report: original: {name}: expected {list(parameter.shape)}, got {got}")
    shape, latent = tuple(parameter.shape), parameter.detach().cpu()
    grid = quantizer.grid if quantizer else "f32"
    if has_codes(grid):
        size = stored_bytes(grid, shape)
        rule, held = quantizer.shipped(latent.float(), None if scales is None else scales.detach().cpu())
        ship = partial(ops.quantize, latent.float(), grid, rule, name, held)
    else:
        size, ship = latent.nbytes, lambda: latent
    return Weight(
        name, shape, grid, size, parameter.requires_grad, lambda: original[name].cpu(), lambda: latent, ship
    )


def _measure_all(
    weights: Sequence[Weight], progress: Progress | None
) -> tuple[list[TensorRow], list[OnGrid]]:
    """The table, then histograms of the tensors that rounding changed most."""
    rows = []
    total = len(weights) + SHOWN

    def tell(done: int, note: str) -> None:
        if progress:
            progress(done, total, note)

    for done, weight in enumerate(weights):
        tell(done, weight.name)
        rows.append(measure(weight))
    pairs = [(row, weight) for row, weight in zip(rows, weights, strict=True) if row.qat_counts]
    pairs.sort(key=lambda pair: -pair[0].qat_error)
    worst = []
    for done, (row, weight) in enumerate(pairs[:SHOWN], len(weights)):
        tell(done, weight.name)
        worst.append(on_grid(weight, row))
    tell(total, "")
    return rows, worst


def _version() -> str:
    import libqat

    return libqat.__version__
