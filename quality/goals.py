"""What the recipes are meant to reach, beside what they reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import tables
from texts import TITLES

Row = Mapping[str, Any]


TITLE = "Goals"


class Goal(NamedTuple):
    """A bound on a figure of the trained model, averaged over seeds."""

    case: str
    figure: str
    bound: float | str
    """A number, or the case whose figure on the same text it is."""
    texts: tuple[str, ...] = ("wiki", "other")


REMOVED, BEST, TOP1, NATS = "KL removed", "KL removed, best PTQ", "top-1", "nats above float"
GOALS = (
    Goal("q4_0", REMOVED, 0.62),
    Goal("q4_0", BEST, 0.40),
    Goal("q4_0", TOP1, 0.84),
    Goal("q4_0-tied", REMOVED, 0.62),
    Goal("q4_0-tied", BEST, 0.40),
    Goal("q4_0-256k", REMOVED, 0.75),
    Goal("q2_0", NATS, 1.20, ("wiki",)),
    Goal("q2_0-256k", NATS, 0.80, ("wiki",)),
    Goal("mlx3_g64", NATS, 0.22),
    Goal("mixed", NATS, "int3_g64"),
)


def figures(rows: Iterable[Row]) -> dict[str, Callable[[], float]]:
    """Of one case on one text."""
    rows = list(rows)
    trained = [row for row in rows if row["kl_qat"] is not None]
    return {
        REMOVED: lambda: tables.mean(row["kl_removed"] for row in trained),
        BEST: lambda: tables.mean(1 - row["kl_qat"] / tables.best_ptq(rows) for row in trained),
        TOP1: lambda: tables.mean(row["top1_qat"] for row in trained),
        NATS: lambda: tables.mean(math.log(row["ppl_qat"] / row["ppl_float"]) for row in trained),
    }


def lines(rows: list[Row]) -> Iterable[list[str]]:
    """A line per goal whose case ran."""
    for goal in GOALS:
        cells, met = [], True
        for text in TITLES:
            here = [row for row in rows if (row["case"], row["text"]) == (goal.case, text)]
            bound = _bound(goal, rows, text)
            if not here or text not in goal.texts or bound is None:
                cells.append("")
                continue
            value = figures(here)[goal.figure]()
            met &= value <= bound if goal.figure == NATS else value >= bound
            cells.append(_number(goal.figure, value))
        if any(cells):
            named = isinstance(goal.bound, str)
            said = f"`{goal.bound}`'s" if named else _number(goal.figure, goal.bound)
            said = ("≤ " if goal.figure == NATS else "≥ ") + said
            yield [f"`{goal.case}`", goal.figure, said, *cells, "yes" if met else "**no**"]


def _bound(goal: Goal, rows: list[Row], text: str) -> float | None:
    """None where the case that sets it has not run."""
    if not isinstance(goal.bound, str):
        return goal.bound
    there = [row for row in rows if (row["case"], row["text"]) == (goal.bound, text)]
    return figures(there)[goal.figure]() if there else None


def _number(figure: str, value: float) -> str:
    return f"{value:.3f}" if figure == NATS else f"{100 * value:.1f} %"


def section(rows: list[Row], kept: str = "") -> str:
    """The Markdown. kept: the section so far, of which the lines stay whose case is not among the rows."""
    columns = ["case", "figure", ">goal", *(f">{title}" for title in TITLES.values()), "met"]
    text = f"## {TITLE}\n\nSet before the work began, from a prototype's figures; means over the seeds.\n\n"
    known = {tuple(line[:2]): line for line in tables.read(kept)} | {
        tuple(line[:2]): line for line in lines(rows)
    }
    order = [(f"`{goal.case}`", goal.figure) for goal in GOALS]
    return text + tables.table(columns, (known[key] for key in order if key in known))
