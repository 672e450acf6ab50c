"""The model families: parity, a short QAT, exported files and their consumers; sizes; Gemma 3 270M.

    make gemma                                  # tiny models of every shape, and the sizes
    make gemma ARGS=--accept-gemma-terms        # also the real Gemma 3 270M, under the Gemma Terms of Use
    make gemma ARGS="--only gemma4-e2b"         # one shape; writes no page

Writes out/gemma/summary.json and the tables of docs/models.md. What is finished is kept in out/gemma/rows, so
an interrupted run continues.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import page
import real
import shapes
import sizes
import study
import torch
from libqat.cli import console, program

from libqat import data, run_folder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def all_shapes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the tiny models."""
    asked = [shape for shape in shapes.SHAPES if not options.only or shape.key in options.only]
    found: list[dict[str, Any]] = []
    with console.progress("tiny models") as update:
        for number, shape in enumerate(asked):
            update(number, len(asked), shape.key)
            path = options.out / "rows" / f"{shape.key}.json"
            found += program.kept(path, lambda shape=shape: study.rows(shape, options.out / "tiny"))
        update(len(asked), len(asked))
    return found


def gemma_270m(options: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of the real model, None where its terms are not accepted."""
    if not options.accept_gemma_terms:
        console.say(f"Gemma 3 270M: skipped; --accept-gemma-terms runs it and accepts {data.GEMMA_TERMS}")
        return None
    source = data.gemma3_270m_gguf(accept_terms=True)
    path = options.out / "rows" / "gemma-3-270m.json"
    return program.kept(path, lambda: real.run(source, options.out / "gemma-3-270m"))


def summary(rows: list[dict], size_rows: list[dict], found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The content of summary.json."""
    entries = [{"kind": "shape", **row} for row in rows]
    entries += [{"kind": "size", **row} for row in size_rows]
    return entries + ([{"kind": "real", **found}] if found else [])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gemma"))
    parser.add_argument("--only", nargs="*", help="keys of shapes (gemma4-e2b, ...), instead of all")
    parser.add_argument(
        "--accept-gemma-terms",
        action="store_true",
        help=f"you accept {data.GEMMA_TERMS}: fetch Gemma 3 270M (238 MB) and train it",
    )
    return parser.parse_args()


def main() -> int:
    begin = time.monotonic()
    options = parse()
    torch.set_num_threads(2)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = all_shapes(options)
    size_rows = sizes.rows()
    found = None if options.only else gemma_270m(options)
    path = options.out / "summary.json"
    run_folder.write_json(path, summary(rows, size_rows, found))
    tables = page.tables(rows, size_rows, found)
    if not options.only:
        page.write(PAGE, tables)
    shutil.rmtree(options.out / "rows", ignore_errors=True)  # the next run measures again
    print("\n".join(tables.values()))
    wrong = page.wrong(rows, size_rows, found)
    seconds = console.clock(time.monotonic() - begin)
    console.say(f"{len(rows)} rows, {len(size_rows)} sizes, {seconds}; {path}; {len(wrong)} with differences")
    for line in wrong:
        console.say(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    program.run(main)
