"""docs/quality.md: the tables of all cases, the peers, and the experiments behind the defaults."""

from __future__ import annotations

from pathlib import Path

import goals
import plots
import tables
from cases import CASES

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
    make quality-quick    # the Q4_0 and q2_0 rows: one seed, starts on 40,960 tokens, fewer judged ones

"""


def write(rows: list[dict], page: Path, more: str = "") -> None:
    """rows: of summary.json. more: further sections."""
    text = HEAD + goals.section(rows)
    for case in CASES:
        here = [row for row in rows if row["case"] == case.name]
        if here:
            tokens = max(row["tokens"] for row in here)
            judged = max(row["eval_tokens"] for row in here)
            text += f"## {case.title}\n\n{tokens:,} training tokens, {judged:,} judged ones of each text.\n\n"
            text += tables.of_case(here) + "\n"
            text += plots.dots(points(here), page.with_suffix("") / f"{case.name}.svg", "qat") + "\n"
    page.write_text((text + more).rstrip() + "\n")


def points(rows: list[dict]) -> plots.Points:
    """Method -> text -> KL of its seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        kl = row["kl_ptq"] if row["kl_qat"] is None else row["kl_qat"]
        found.setdefault(row["method"], {}).setdefault(row["text"], []).append(kl)
    return found
