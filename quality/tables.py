"""The figures as JSON and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cases import BASELINES
from texts import TITLES

from libqat import run_folder

Row = Mapping[str, Any]


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    values = list(values)
    return sum(values) / len(values)


def spread(values: Iterable[float], form: str) -> str:
    """The mean, and the least and the largest when they differ."""
    values = list(values)
    text = form.format(mean(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))} – {form.format(max(values))})"


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """A list of objects, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = [{key: finite(value) for key, value in row.items()} for row in rows]
    run_folder.write_json(path, clean)


def table(columns: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table; columns that start with '>' are aligned right."""
    head = "| " + " | ".join(column.lstrip(">") for column in columns) + " |"
    rule = "|" + "|".join("---:" if column.startswith(">") else "---" for column in columns) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def read(text: str) -> list[list[str]]:
    """The cells of the tables in a Markdown text, line by line; heads are lines, too."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


COLUMNS = [
    "text",
    "method",
    ">seeds",
    ">perplexity",
    ">nats",
    ">KL",
    ">KL removed",
    ">against best PTQ",
    ">top-1",
]


def of_case(rows: list[Row]) -> str:
    """One grid: float, every PTQ method, QAT, on each text."""
    lines = []
    for text in TITLES:
        here = [row for row in rows if row["text"] == text]
        lines.append([TITLES[text], "float", "", f"{here[0]['ppl_float']:.2f}", "0", "0", "", "", "100 %"])
        best = best_ptq(here)
        for method in dict.fromkeys(row["method"] for row in here):
            lines.append(["", *_line([row for row in here if row["method"] == method], best)])
    return table(COLUMNS, lines)


def best_ptq(rows: list[Row]) -> float:
    """The least KL that a baseline leaves; RTN's where nothing else was tried."""
    return min(row["kl_ptq"] for row in rows if row["kl_qat"] is not None or row["method"] in BASELINES)


def _line(rows: list[Row], best: float) -> list[str]:
    trained = rows[0]["kl_qat"] is not None
    key = "qat" if trained else "ptq"
    method = f"**{rows[0]['method']}**" if trained else rows[0]["method"]
    shares = ["", ""]
    if trained or rows[0]["method"] != "rtn":
        shares = [
            spread((100 * row["kl_removed"] for row in rows), "{:.0f}") + " %",
            spread((100 * (1 - row[f"kl_{key}"] / best) for row in rows), "{:.0f}") + " %"
            if trained or rows[0]["method"] not in BASELINES
            else "",
        ]
    return [
        method,
        str(len(rows)),
        spread((row[f"ppl_{key}"] for row in rows), "{:,.2f}"),
        spread((math.log(row[f"ppl_{key}"] / row["ppl_float"]) for row in rows), "{:.3f}"),
        spread((row[f"kl_{key}"] for row in rows), "{:.4f}"),
        *shares,
        spread((100 * row[f"top1_{key}"] for row in rows), "{:.1f}") + " %",
    ]
