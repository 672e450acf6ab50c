"""Every grid through every consumer that reads it, then short QAT runs scored where they are served.

    make interop                            # everything; writes out/interop/summary.json and docs/fidelity.md
    make interop ARGS="--only q4_0 int4_g32 --no-training"

A finished comparison is kept in out/interop/rows, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ggml
import mlx_cpu
import requantized
import tables
import torch
import trained
import transformers_cpu
import weights
from libqat.cli import console, program

import libqat
from libqat import data, llama_cpp

PAGE = Path(__file__).resolve().parents[1] / "docs" / "fidelity.md"


class Consumer(NamedTuple):
    """A module that reads a target's files, and the grids to compare."""

    module: object
    target: str
    grids: tuple[str, ...]
    smallest: float = 0.0
    """Rows of smaller weights are left out, but for zeros."""


GROUPS = ("channel", "g32", "g64", "g128", "g256")
CONSUMERS = (
    Consumer(ggml, "gguf", tuple(ggml.SCALE_BYTES)),
    # Where the fp16 scale underflows to 0, a file may hold codes that no rounding of zeros gives back.
    Consumer(requantized, "hf", ("q4_0", "q8_0"), smallest=2.0**-12),
    Consumer(
        transformers_cpu,
        "compressed-tensors",
        (
            *(f"int{bits}_{group}" for bits in (2, 3, 4, 8) for group in GROUPS),
            "int4_g32@bf16:bf16",
            "int4_g128@bf16:bf16",
            "int4_g32@fp16:fp16",
            "int2_g32@bf16_fp16",
            "int8_channel@pow2",
        ),
    ),
    Consumer(transformers_cpu, "gemma-mobile", ("mobile2", "mobile4", "mobile8")),
    Consumer(
        mlx_cpu,
        "mlx",
        (
            *(f"mlx{bits}_g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
            "mlx4_g64@bf16",
            "mlx4_g64@fp16",
            "mlx2_g32@bf16",
        ),
    ),
)


RANGES = {
    "nvfp4": (0.0, 6 * 448.0),  # e4m3 scales end at 448
    "mxfp4": (2.0**-120, math.inf),  # ggml's exponent wraps below 2^-125, which C leaves undefined
}
"""Magnitudes of the adversarial rows, on grids that cannot take them all."""


def compare(consumer: Consumer, grid: str, blocks: int, out: Path) -> dict:
    """One row of the table."""
    smallest, largest = RANGES.get(grid, (0.0, math.inf))
    filled = weights.fill(grid, blocks, max(consumer.smallest, smallest), largest)
    path = out / "files" / ("model.gguf" if consumer.target == "gguf" else "model")
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir(parents=True)
    libqat.export(filled.checkpoint, path, target=consumer.target)
    codes, scales, values = consumer.module.compare(path, filled, grid)
    shutil.rmtree(path.parent)
    return {
        "grid": grid,
        "consumer": consumer.module.NAME,
        "target": consumer.target,
        "blocks": filled.blocks,
        "differing_codes": codes,
        "differing_scales": scales,
        "differing_values": values,
        "consumer_version": consumer.module.version(),
    }


def all_comparisons(options: argparse.Namespace) -> list[dict]:
    """The rows of the fidelity table."""
    asked = [
        (consumer, grid)
        for consumer in CONSUMERS
        for grid in consumer.grids
        if not options.only or grid in options.only
    ]
    found = []
    with console.progress("comparing") as update:
        for number, (consumer, grid) in enumerate(asked):
            update(number, len(asked), f"{grid} in {consumer.module.NAME}")
            path = options.out / "rows" / f"{consumer.target}-{grid.replace(':', '-')}-{options.blocks}.json"
            make = partial(compare, consumer, grid, options.blocks, options.out)
            found.append(program.kept(path, make))
        update(len(asked), len(asked))
    return found


def in_llama_cpp(path: Path, tokens: list[int]) -> list[float]:
    with llama_cpp.LlamaCpp(path, context=len(tokens) + 8) as llama:
        return llama.score(tokens)


MOBILE = {
    "rules": [
        {"match": ".*embed_tokens", "weight": "mobile4"},
        {"match": ".*\\.2[4-9]\\.mlp\\.(gate|up)_proj", "weight": "mobile2"},
        {"match": ".*_proj", "weight": "mobile4"},
    ],
    "estimator": {"kind": "ste", "scale": "search"},
}
CASES = (
    trained.Case("gguf-q4_0", "gguf-q4_0", "gguf", in_llama_cpp),
    trained.Case("gguf-q2_0-mixed", "gguf-q2_0-mixed", "gguf", in_llama_cpp),
    trained.Case("ct-w4a16", "ct-w4a16", "compressed-tensors", transformers_cpu.score),
    trained.Case("mlx-4bit", "mlx-4bit", "mlx", mlx_cpu.score),
    trained.Case("mobile-2-4-bit", MOBILE, "gemma-mobile", transformers_cpu.score),
)


def all_runs(options: argparse.Namespace) -> list[dict]:
    """The rows of the trained table."""
    source = data.smollm2_gguf()
    tokenizer = libqat.load_tokenizer(source)
    training, held_out = data.wikipedia_articles()
    tokens = data.tokenize(tokenizer, [article.text for article in training], limit=400_000)
    judged = data.tokenize(tokenizer, [article.text for article in held_out], limit=options.tokens + 1)
    out = options.out / "trained"
    return [
        program.kept(
            out / f"{case.name}-{options.steps}.json",
            lambda c=case: trained.run(c, source, tokens, judged[: options.tokens + 1], out, options.steps),
        )
        for case in CASES
        if not options.only or case.name in options.only
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/interop"))
    parser.add_argument("--blocks", type=int, default=1_000_000, help="of each grid, at least")
    parser.add_argument("--only", nargs="*", help="grids and policies, instead of all")
    parser.add_argument("--steps", type=int, default=40, help="of training, of 512 tokens")
    parser.add_argument("--tokens", type=int, default=400, help="that each consumer scores")
    parser.add_argument("--no-training", action="store_true")
    return parser.parse_args()


def main() -> int:
    begin = time.monotonic()
    options = parse()
    torch.set_num_threads(2)
    fidelity = all_comparisons(options)
    runs = [] if options.no_training else all_runs(options)
    whole = not options.only and not options.no_training
    tables.write(fidelity, runs, options.out / "summary.json", PAGE if whole else None)
    shutil.rmtree(options.out / "rows", ignore_errors=True)  # the next run measures again
    print(tables.markdown(fidelity, runs))
    wrong = [
        row for row in fidelity if any(row[f"differing_{part}"] for part in ("codes", "scales", "values"))
    ]
    wrong += [row for row in runs if row["differences"]]
    seconds = console.clock(time.monotonic() - begin)
    console.say(f"{len(fidelity)} comparisons, {len(runs)} runs, {len(wrong)} with differences, {seconds}")
    return 1 if wrong else 0


if __name__ == "__main__":
    program.run(main)
