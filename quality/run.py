"""What quantization takes and what training gives back: PTQ and QAT on the same grids, tokens and texts.

    make quality                                   # all cases; resumable, hours
    make quality ARGS="--only q4_0 --seeds 1"      # one case again
    make quality ARGS="--only ablations peers"     # the other sections
    make quality-quick                             # the Q4_0 and q2_0 rows, one seed

Every checkpoint and every score is kept in out/quality, so an interrupted command goes on where it was.
Writes out/quality/summary.json and docs/quality.md, in which cases that this command left out stay as they
were. --quick writes out/quality/quick.json only.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import ablations
import mixture
import peers
import published
import tables
import torch
from cases import BASELINES, CASES, Case
from libqat.cli import console, program
from models import Maker
from scoring import Scores
from texts import STEP, WINDOW, Texts, read

import libqat
from libqat import data

QUICK_START = 30_720
"""Tokens that a start looks at with --quick: it takes the most time."""
ABLATION_TOKENS = 8192
"""Of each text: enough to rank settings, not to publish one."""
SECTIONS = ("peers", "mixture", "ablations")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quality.md"


def parse() -> argparse.Namespace:
    """The command line; the defaults are the published run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--quick", action="store_true", help="the quick cases: one seed, shorter starts")
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=[*names, *SECTIONS], default=[*names, *SECTIONS])
    parser.add_argument("--seeds", type=int, help="at most this many of each case")
    parser.add_argument("--eval-tokens", type=int, help="of each text; 16,384, or 4,096 with --quick")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.eval_tokens = options.eval_tokens or (4096 if options.quick else 16384)
    return options


def chosen(options: argparse.Namespace) -> list[tuple[Case, tuple[int, ...]]]:
    """The cases that are asked for, and their seeds."""
    cases = [case for case in CASES if case.name in options.only]
    if options.quick:
        cases = [replace(case, ptq=BASELINES, seeds=case.seeds[:1]) for case in cases if case.quick]
    return [(case, case.seeds[: options.seeds]) for case in cases]


def rows_of(case: Case, seeds: tuple[int, ...], maker: Maker, scores: Scores) -> list[dict]:
    """The case's rows: each PTQ method, and QAT with each seed, on each text."""
    # Runs first: the start of one is the checkpoint of its method.
    trained = {f"{case.name} seed {seed}": maker.trained(case, seed) for seed in seeds}
    paths = {f"{case.name} {method}": maker.rounded(case, method) for method in case.ptq}
    found = scores.of(paths | {name: run.checkpoint for name, run in trained.items()})
    rtn = found[f"{case.name} rtn"]
    rows = []
    for text in scores.judged:
        for method, name in zip(case.ptq, paths, strict=True):
            rows.append(row(case, text, found[name], rtn) | {"method": method, "objective": "", "seed": 0})
        for seed, (name, run) in zip(seeds, trained.items(), strict=True):
            rows.append(row(case, text, found[name], rtn, qat=True) | run.entry() | {"seed": seed})
    return rows


def row(case: Case, text: str, found: dict, rtn: dict, qat: bool = False) -> dict:
    """A row without what says how it was made. PTQ stands for RTN in a QAT row, else for the row's method."""
    float_, model = found[text]["float"], found[text]["model"]
    ptq = rtn[text]["model"] if qat else model
    entry = {
        "case": case.name,
        "grid": case.grid,
        "tokens": case.steps * STEP if qat else 0,
        "text": text,
        "eval_tokens": found[text]["tokens"],
        "ppl_float": float_["ppl"],
    }
    for figure in ("ppl", "kl", "top1"):
        entry[f"{figure}_ptq"] = ptq[figure]
        entry[f"{figure}_qat"] = model[figure] if qat else None
    return entry | {"kl_removed": libqat.share_removed(rtn[text]["model"]["kl"], model["kl"])}


def measure(options: argparse.Namespace, maker: Maker, scores: Scores, kept: list[dict]) -> list[dict]:
    """The rows of all cases, in order; summary.json grows with each. kept: rows of an earlier command."""
    order = {case.name: number for number, case in enumerate(CASES)}
    for case, seeds in chosen(options):
        console.say(f"{case.title}: {case.steps} steps, seeds {', '.join(map(str, seeds))}")
        found = rows_of(case, seeds, maker, scores)
        kept = sorted(
            [row for row in kept if row["case"] != case.name] + found, key=lambda row: order[row["case"]]
        )
        tables.write_json(options.out / ("quick.json" if options.quick else "summary.json"), kept)
        print(f"\n{case.title}\n\n{tables.of_case(found)}", flush=True)
    return kept


def further(options: argparse.Namespace, maker: Maker, texts: Texts) -> dict[str, str]:
    """Title -> section of what stands behind the cases: peers in llama.cpp, and the experiments."""
    folder = PAGE.with_suffix("")
    found = {}
    if "peers" in options.only:
        served = peers.rows(maker, texts.judged)
        tables.write_json(options.out / "llama_cpp.json", served)
        found[peers.TITLE] = peers.section(served)
    if "mixture" in options.only:
        found[mixture.TITLE] = mixture.section(mixture.rows(maker, options.out / "mixture.json"), folder)
    if "ablations" in options.only:
        fewer = read(maker.source, ABLATION_TOKENS).judged
        scores = Scores(options.out / "scores", maker.source, fewer, WINDOW)
        for name in ablations.CHANGES:
            changed = ablations.rows(maker, scores, name)
            tables.write_json(options.out / f"ablations-{name}.json", changed)
            found[ablations.title(name)] = ablations.section(changed, folder)
    return found


def main() -> None:
    """All cases, then the page."""
    begin = time.monotonic()
    options = parse()
    torch.set_num_threads(options.threads)
    source = data.smollm2_gguf()
    console.say("reading Wikipedia and the Python reference")
    texts = read(source, options.eval_tokens)
    made = options.out / "quick" if options.quick else options.out
    maker = Maker(source, texts.training, made, QUICK_START if options.quick else None)
    scores = Scores(options.out / "scores", source, texts.judged, WINDOW)
    summary = options.out / "summary.json"
    kept = json.loads(summary.read_text()) if summary.exists() and not options.quick else []
    rows = measure(options, maker, scores, kept)
    if not options.quick:
        published.write(rows, PAGE, further(options, maker, texts))
    console.say(f"done in {console.clock(time.monotonic() - begin)}; figures in {options.out}")


if __name__ == "__main__":
    program.run(main)
