"""The report of a run: one HTML file that holds everything it shows and asks nothing of the network.

`gather_run` and `gather_model` collect the numbers, `render` makes the page of them, `write_report` and
`write_model_report` do both. Needs matplotlib and jinja2: `pip install 'libqat[report]'`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import replace_file
from .curves import save_training_png
from .data import Progress, ReportData, gather_model, gather_run
from .inputs import read_telemetry
from .page import render

REPORT = "report.html"
"""Name of the report in a run folder."""


def write_report(
    run: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    model: str | os.PathLike | None = None,
    title: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the report of a finished run folder and returns its path. It appears whole or not at all.

    out: default RUN/report.html. model: the float model that the run began with; default: what the run says.
    title: the model's name; default: the name of its folder or file. command: what to show as the way to
    repeat the run, where that was not `libqat finetune`.
    progress: called as progress(done, total, tensor name).

    The same run gives the same bytes. FileError for missing, malformed and unfinished runs; ArgumentError
    when `model` is not the model of the run; UnsupportedError when matplotlib or jinja2 is not installed.
    """
    data = gather_run(run, model, title, command, progress)
    return save_page(render(data), Path(run) / REPORT if out is None else out)


def write_model_report(
    prepared: Any,
    original: Mapping[str, Tensor],
    out: str | os.PathLike,
    *,
    title: str,
    **about: Any,
) -> Path:
    """Writes the report of a model that `libqat.prepare` attached to, trained in any loop.

    prepared: the model, or what `prepare` returned. original: parameter name -> float tensor before training,
    e.g. `{n: p.detach().clone() for n, p in model.named_parameters()}`. title: the model's name.

    about, all optional: telemetry: one mapping per step with `step` and any of `loss`, `learning_rate`,
    `gradient_norm`, `flip_rate`, `distance_to_grid`; evaluation: a document in the layout of evaluation.json;
    options: settings to show; command: how to repeat the training; progress: as in `write_report`.
    """
    return save_page(render(gather_model(prepared, original, title=title, **about)), out)


def save_page(html: str, out: str | os.PathLike) -> Path:
    """Writes a page by renaming a finished file. FileError naming the path."""
    return replace_file(out, html.encode("utf-8", "replace"), "report")


__all__ = [
    "REPORT",
    "ReportData",
    "gather_model",
    "gather_run",
    "read_telemetry",
    "render",
    "save_page",
    "save_training_png",
    "write_model_report",
    "write_report",
]
