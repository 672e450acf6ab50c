"""The report's other figures: scores with their intervals, error by depth, and weights on their grid."""

from collections.abc import Sequence
from itertools import pairwise

from .evaluation import Task
from .formatting import label
from .levels import OnGrid
from .svg import COLOURS, figure, inline_svg
from .tensors import TensorRow

_NAMED_TICKS = 8
_ROW_COLOURS = {"float": COLOURS["float"], "ptq": COLOURS["ptq"], "qat": COLOURS["qat"]}


def interval_figure(task: Task, field: str, name: str, axis: str) -> str:
    """One dot per model with its 95 % interval. "" when fewer than two models have the field."""
    rows = [row for row in task.rows if row.scores[field].value is not None]
    if len(rows) < 2:
        return ""
    with figure(4.8, 0.75 + 0.27 * len(rows)) as (drawing, axes):
        for place, row in enumerate(rows):
            measured, colour = row.scores[field], _ROW_COLOURS.get(row.row, COLOURS["other"])
            if measured.interval:
                axes.plot(measured.interval, (place, place), color=colour, linewidth=5, alpha=0.35)
            axes.plot(measured.value, place, "o", color=colour, markersize=6)
        axes.set_yticks(range(len(rows)), [label(row.label) for row in rows])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.margins(x=0.08)
        axes.set_xlabel(axis)
        values = ", ".join(f"{row.label} {row.scores[field].value:.4g}" for row in rows)
        return inline_svg(drawing, name, f"{axis} on {task.name}: {values}")


def order_figure(rows: Sequence[TensorRow], name: str = "order") -> str:
    """Relative errors of the quantized tensors in the model's order; "" when there are fewer than two."""
    rows = [row for row in rows if row.ptq_error is not None]
    if len(rows) < 2:
        return ""
    with figure(11, 2.8) as (drawing, axes):
        for key in ("ptq", "qat"):
            values = [100 * getattr(row, f"{key}_error") for row in rows]
            axes.plot(
                range(1, len(rows) + 1),
                values,
                color=COLOURS[key],
                label=key.upper(),
                marker=".",
                markersize=4,
            )
        axes.set_ylim(bottom=0)
        axes.set_title("Error against the float weights (% of their RMS)")
        axes.set_xlabel("quantized tensor, in the model's order")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(rows) <= _NAMED_TICKS:
            axes.set_xticks(range(1, len(rows) + 1), [label(row.role) for row in rows])
        _legend(axes)
        return inline_svg(drawing, name, f"Relative error of {len(rows)} quantized tensors, PTQ and QAT")


def latent_figure(shown: OnGrid, name: str) -> str:
    """Where the latents lie between the levels, with the float weights behind them."""
    centres = [(low + high) / 2 for low, high in pairwise(shown.edges)]
    with figure(4.8, 2.3) as (drawing, axes):
        if len(shown.levels) <= 32:
            axes.vlines(
                shown.levels, 0, 1, transform=axes.get_xaxis_transform(), color=COLOURS["line"], linewidth=1
            )
        axes.fill_between(centres, [100 * share for share in shown.latent], step="mid", color=COLOURS["qat"],
                          alpha=0.55, linewidth=0, label="latents")  # fmt: skip
        axes.plot(centres, [100 * share for share in shown.original], drawstyle="steps-mid",
                  color=COLOURS["ptq"], linewidth=0.9, label="float weights")  # fmt: skip
        _code_axis(axes, sorted({round(level) for level in shown.levels}), "% of weights per bin")
        text = (
            f"Histogram of the latents of {shown.row.name} in code units, levels of {shown.row.grid} marked"
        )
        return inline_svg(drawing, name, text)


def occupancy_figure(shown: OnGrid, name: str) -> str:
    """How many weights have each code, after rounding to nearest and after training."""
    total = max(shown.row.weights, 1)
    shares = [
        [100 * count / total for count in counts] for counts in (shown.row.ptq_counts, shown.row.qat_counts)
    ]
    with figure(4.8, 2.3) as (drawing, axes):
        if len(shown.codes) <= 32:
            for shift, values, key in zip((-0.2, 0.2), shares, ("ptq", "qat"), strict=True):
                places = [code + shift for code in shown.codes]
                axes.bar(places, values, 0.38, color=COLOURS[key], label=key.upper())
        else:
            for values, key in zip(shares, ("ptq", "qat"), strict=True):
                axes.step(
                    shown.codes, values, where="mid", color=COLOURS[key], linewidth=1, label=key.upper()
                )
        _code_axis(axes, shown.codes, "% of weights per code")
        pairs = zip(shown.codes, *shares, strict=True)
        spoken = "; ".join(f"{code}: {ptq:.1f} and {qat:.1f}" for code, ptq, qat in list(pairs)[:16])
        return inline_svg(drawing, name, f"Codes of {shown.row.name}, percent under PTQ and QAT. {spoken}")


def _legend(axes) -> None:
    """Beside the title, where it covers nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, handlelength=1.2)


def _code_axis(axes, places: Sequence[int], title: str) -> None:
    axes.set_xlim(places[0] - 1, places[-1] + 1)
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel("code")
    if len(places) <= 16:
        axes.set_xticks(places)
    _legend(axes)
