"""The tables as figures: one dot per setting and text, KL on a logarithmic axis. Same rows, same bytes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from libqat.html_report.svg import COLOURS, figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from texts import TITLES

Points = Mapping[str, Mapping[str, list[float]]]
"""Setting -> text -> KL of each seed."""
_FILL = {"wiki": COLOURS["qat"], "other": COLOURS["paper"]}


def dots(points: Points, path: Path, emphasized: str) -> str:
    """Draws the settings from top to bottom; returns Markdown for a page beside the file's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with figure(7.2, 0.8 + 0.27 * len(points)) as (drawing, axes):
        drawing.set_facecolor(COLOURS["paper"])
        for place, (setting, texts) in enumerate(points.items()):
            edge = COLOURS["qat"] if setting == emphasized else COLOURS["ptq"]
            for text, values in texts.items():
                fill = edge if text == "wiki" else _FILL[text]
                axes.plot([min(values), max(values)], [place, place], color=edge, linewidth=4, alpha=0.35)
                mean = sum(values) / len(values)
                label = TITLES[text] if setting == emphasized else None
                axes.plot(mean, place, "o", color=edge, markerfacecolor=fill, markersize=6, label=label)
        axes.set_yticks(range(len(points)), list(points))
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("KL to the float model, nats per token")
        drawing.legend(loc="outside upper right", ncols=len(TITLES), frameon=False)
        _save(drawing, path)
    return f"![KL of every setting]({path.parent.name}/{path.name})\n"


def curve(mixtures: Sequence[tuple[float, float]], uniform: tuple[float, float], path: Path) -> str:
    """Draws (bits per weight, KL) of mixtures as a line, and that of a uniform width as a dot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with figure(7.2, 3.2) as (drawing, axes):
        drawing.set_facecolor(COLOURS["paper"])
        axes.plot(*zip(*mixtures, strict=True), color=COLOURS["ptq"], label="best mixture of 2 and 4 bits")
        axes.plot(*uniform, "o", color=COLOURS["qat"], markersize=6, label="3 bits everywhere")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("sum of the parts' KL, nats per token")
        drawing.legend(loc="outside upper right", ncols=2, frameon=False)
        _save(drawing, path)
    return f"![KL of mixtures by size]({path.parent.name}/{path.name})\n"


def _save(drawing, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        drawing.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
    temporary.replace(path)
