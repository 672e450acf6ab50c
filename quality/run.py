"""What quantization takes and what training gives back: PTQ and QAT on the same grids, tokens and texts.

    make quality                                   # all cases; resumable, hours
    make quality ARGS="--only q4_0 --seeds 1"
    make quality-quick                             # the Q4_0 and q2_0 rows, one seed

Every checkpoint and every score is kept in out/quality, so an interrupted command goes on where it was.
Writes out/quality/summary.json, and docs/quality.md when all cases ran.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import ablations
import page
import peers
import tables
import torch
from cases import CASES, Case
from libqat.cli import console
from models import Maker
from scoring import Scores
from texts import STEP, WINDOW, Texts, read

import libqat
from libqat import data

ABLATION_TOKENS = 8192
"""Of each text: enough to rank settings, not to publish one."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quality.md"


def parse() -> argparse.Namespace:
    """The command line; the defaults are the published run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--quick", action="store_true", help="the quick cases, one seed, 8,192 judged tokens")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--seeds", type=int, help="at most this many of each case")
    parser.add_argument("--eval-tokens", type=int, help="of each text; 65,536, or 8,192 with --quick")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.eval_tokens = options.eval_tokens or (8192 if options.quick else 65536)
    return options


def chosen(options: argparse.Namespace) -> list[tuple[Case, tuple[int, ...]]]:
    """The cases that are asked for, and their seeds."""
    cases = [case for case in CASES if not options.only or case.name in options.only]
    if options.quick:
        cases = [case for case in cases if case.quick]
    count = options.seeds or (1 if options.quick else len(max((case.seeds for case in cases), key=len)))
    return [(case, case.seeds[:count]) for case in cases]


def rows_of(case: Case, seeds: tuple[int, ...], maker: Maker, scores: Scores) -> list[dict]:
    """The case's rows: each PTQ method, and QAT with each seed, on each text."""
    paths = {f"{case.name} {method}": maker.rounded(case, method) for method in case.ptq}
    trained = {f"{case.name} seed {seed}": maker.trained(case, seed) for seed in seeds}
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


def further(options: argparse.Namespace, source: Path, maker: Maker, texts: Texts) -> str:
    """The sections behind the cases: the experiments, and the peers in llama.cpp."""
    fewer = read(source, ABLATION_TOKENS).judged
    changed = ablations.rows(maker, Scores(options.out / "scores", source, fewer, WINDOW), None)
    tables.write_json(options.out / "ablations.json", changed)
    served = peers.rows(maker, texts.judged)
    tables.write_json(options.out / "llama_cpp.json", served)
    return peers.section(served) + "\n" + ablations.section(changed)


def main() -> None:
    """All cases in order; the summary grows with each."""
    begin = time.monotonic()
    options = parse()
    torch.set_num_threads(options.threads)
    source = data.smollm2_gguf()
    console.say("reading Wikipedia and the Python reference")
    texts = read(source, options.eval_tokens)
    maker = Maker(source, texts.training, options.out)
    scores = Scores(options.out / "scores", source, texts.judged, WINDOW)
    summary = options.out / ("quick.json" if options.quick else "summary.json")
    rows: list[dict] = []
    for case, seeds in chosen(options):
        console.say(f"{case.title}: {case.steps} steps, seeds {', '.join(map(str, seeds))}")
        found = rows_of(case, seeds, maker, scores)
        rows += found
        tables.write_json(summary, rows)
        print(f"\n{case.title}\n\n{tables.of_case(found)}", flush=True)
    if not options.quick and not options.only:
        page.write(rows, PAGE, further(options, source, maker, texts))
    console.say(f"done in {console.clock(time.monotonic() - begin)}; figures: {summary}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
    except libqat.Error as error:
        sys.exit(f"error: {error}")
