"""docs/quality.md: the tables of all cases, the peers, and the experiments behind the defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import ablations
import goals
import mixture
import peers
import plots
import tables
from cases import CASES, Case

HEAD = """# Quality: what rounding takes, and what training gives back

SmolLM2-135M-Instruct, trained on Wikipedia articles (30 % of the windows as raw wikitext) and judged on
held-out articles and on the Python language reference, in windows of 256, in float32 from the numbers that
ship. **KL** is the divergence of the rounded model from the float one in nats
per token, **KL removed** is 1 - KL/KL(RTN), and beside it the same against the best of RTN, search, AWQ and
GPTQ; top-1 is how often both models choose the same next token; nats is the loss above the float model's.
RTN rounds by the consumer's own rule. AWQ, GPTQ and guided have seen the first 51,200 tokens that the run
with seed 0 trains on; guided, which is libqat's own method and where training starts, also as many that the
float model wrote. All rows of a grid are files of the same size. Where there are several seeds, the mean
stands before the least and the largest.

    make quality          # everything below, resumable; hours on 2 cores
    make quality-quick    # the Q4_0 and q2_0 rows: one seed, PTQ and starts on 30,720 tokens, less text

"""


FURTHER = (peers.TITLE, mixture.TITLE, *(ablations.title(name) for name in ablations.CHANGES))
"""Sections behind the cases."""


def write(rows: list[dict], page: Path, further: Mapping[str, str]) -> None:
    """Puts new sections in the place of those of the same title; the page keeps all others as they are.

    rows: of summary.json. further: title -> section, of what is not a case.
    """
    kept = sections(page.read_text()) if page.exists() else {}
    new = {goals.TITLE: goals.section(rows, kept.get(goals.TITLE, ""))}
    for case in CASES:
        here = [row for row in rows if row["case"] == case.name]
        if here:
            new[case.title] = of_case(case, here, page.with_suffix(""))
    new |= further
    order = [goals.TITLE, *(case.title for case in CASES), *FURTHER]
    every = kept | new
    text = HEAD + "\n".join(every[title].strip() + "\n" for title in order if title in every)
    temporary = page.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(page)


def sections(text: str) -> dict[str, str]:
    """Title -> section of a page, with its heading."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0].removeprefix("## "): part for part in parts}


def of_case(case: Case, rows: list[dict], folder: Path) -> str:
    """The section of a case; its figure goes to `folder`."""
    tokens = max(row["tokens"] for row in rows)
    judged = max(row["eval_tokens"] for row in rows)
    text = f"## {case.title}\n\n{tokens:,} training tokens, {judged:,} judged ones of each text.\n\n"
    text += tables.of_case(rows) + "\n"
    return text + plots.dots(points(rows), folder / f"{case.name}.svg", "qat")


def points(rows: list[dict]) -> plots.Points:
    """Method -> text -> KL of its seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        kl = row["kl_ptq"] if row["kl_qat"] is None else row["kl_qat"]
        found.setdefault(row["method"], {}).setdefault(row["text"], []).append(kl)
    return found
