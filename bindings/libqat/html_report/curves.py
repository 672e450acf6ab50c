"""Training curves: one small figure for each thing that telemetry measured."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .svg import COLOURS, figure, inline_svg

Steps = Sequence[dict[str, Any]]
_LEAST_SPAN = 0.1
_POINTS = 500
"""Longer series are drawn as means over equal stretches of steps."""


@dataclass(frozen=True)
class Curve:
    """What one figure shows of telemetry."""

    key: str
    title: str
    unit: str = ""
    scale: float = 1.0
    colour: str = COLOURS["qat"]
    from_zero: bool = True


_CURVES = (
    Curve("loss", "Loss"),
    Curve("learning_rate", "Learning rate", colour=COLOURS["float"]),
    Curve("gradient_norm", "Gradient norm", colour=COLOURS["float"]),
    Curve("flip_rate", "Flip rate", "% of codes", 100, COLOURS["ptq"]),
    Curve("distance_to_grid", "Distance to grid", "% of RMS", 100, COLOURS["ptq"], from_zero=False),
    Curve("oscillation", "Oscillation", "% of codes", 100, COLOURS["ptq"]),
    Curve("clip_rate", "Clip rate", "% of weights", 100, COLOURS["ptq"]),
    Curve("scale_drift", "Scale drift", "% of the mean scale", 100, COLOURS["ptq"]),
    Curve("probe_kl", "KL on the probe batch", "nats per token"),
    Curve("evaluation", "KL during training", "nats per token, held-out"),
)


def series(steps: Steps, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) where `key` was measured; "evaluation" is the student's KL, or its loss without one."""
    if key == "evaluation":
        scored = [(step["step"], step[key]) for step in steps if "student" in step.get(key, {})]
        pick = "kl" if any("teacher" in scores for _, scores in scored) else "nll"
        return [at for at, _ in scored], [scores["student"][pick] for _, scores in scored]
    measured = [step for step in steps if key in step]
    return [step["step"] for step in measured], [step[key] for step in measured]


def training_figures(steps: Steps, clip_norm: float = 0.0, loss_unit: str = "") -> list[tuple[str, str]]:
    """(title, SVG) of each curve that has values. clip_norm: drawn into the gradient norm, unless 0."""
    figures = []
    for curve in _CURVES:
        if not series(steps, curve.key)[0]:
            continue
        with figure() as (drawing, axes):
            _draw(axes, curve, steps, clip_norm)
            if curve.key == "loss" and loss_unit:
                axes.set_title(f"{curve.title} ({loss_unit})")
            figures.append((curve.title, inline_svg(drawing, f"curve-{curve.key}", _spoken(curve, steps))))
    return figures


def save_training_png(steps: Steps, path: str | os.PathLike, title: str = "") -> None:
    """All curves in one PNG, for pages that cannot hold SVG."""
    with figure(11, 5.6) as (drawing, first):
        first.remove()
        drawing.set_facecolor("white")
        drawing.suptitle(title, x=0.01, ha="left", fontweight="bold")
        present = [curve for curve in _CURVES if series(steps, curve.key)[0]]
        for place, curve in enumerate(present, 1):
            _draw(drawing.add_subplot(2, -(-len(present) // 2), place), curve, steps, 0)
        drawing.savefig(path, dpi=140)


def _draw(axes, curve: Curve, steps: Steps, clip_norm: float) -> None:
    at, values = series(steps, curve.key)
    values = [value * curve.scale for value in values]
    dense = len(at) > 20
    if len(at) > _POINTS:
        at, values = _thin(at, values)
    axes.plot(
        at,
        values,
        color=curve.colour,
        alpha=0.35 if dense and curve.key in ("loss", "gradient_norm") else 1,
        marker="" if dense else "o",
        markersize=3,
    )
    if dense and curve.key in ("loss", "gradient_norm"):
        axes.plot(at, _smooth(values), color=curve.colour, linewidth=1.8)
    if curve.key == "gradient_norm" and 0 < clip_norm <= 1.2 * max(values):
        axes.axhline(clip_norm, color=COLOURS["ptq"], linewidth=0.8, linestyle="--")
        axes.annotate("clipped above", (at[0], clip_norm), (0, 2), textcoords="offset points", fontsize=8,
                      color=COLOURS["ptq"])  # fmt: skip
    if curve.key == "probe_kl" and (start := series(steps, "probe_kl_start")[1]):
        axes.axhline(start[0], color=COLOURS["ptq"], linewidth=0.8, linestyle="--")
        axes.annotate("before training", (at[0], start[0]), (0, 2), textcoords="offset points", fontsize=8,
                      color=COLOURS["ptq"])  # fmt: skip
    if curve.from_zero:
        axes.set_ylim(bottom=0)
    else:
        _at_least(axes, _LEAST_SPAN)
    if curve.key == "learning_rate":
        axes.yaxis.set_major_formatter(lambda value, _: re.sub("e-0", "e-", f"{value:g}"))
    axes.set_title(f"{curve.title}" + (f" ({curve.unit})" if curve.unit else ""))
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _at_least(axes, share: float) -> None:
    """Widens the axis to this share of its middle, so that a nearly constant curve looks like one."""
    low, high = axes.get_ylim()
    missing = share * (low + high) / 2 - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)


def _thin(at: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    borders = [round(index * len(at) / _POINTS) for index in range(_POINTS + 1)]
    parts = [slice(first, last) for first, last in pairwise(borders)]
    return tuple([sum(line[part]) / len(line[part]) for part in parts] for line in (at, values))


def _smooth(values: list[float]) -> list[float]:
    """Mean over a window of a tenth of the series, centred, shorter at the ends."""
    reach = max(len(values) // 20, 2)
    means = []
    for index in range(len(values)):
        near = values[max(index - reach, 0) : index + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _spoken(curve: Curve, steps: Steps) -> str:
    at, values = series(steps, curve.key)
    return (
        f"{curve.title}, steps {at[0]} to {at[-1]}: begins at {values[0]:.3g}, ends at {values[-1]:.3g}, "
        f"between {min(values):.3g} and {max(values):.3g}"
    )
