"""`make bench`: runs every benchmark, keeps the figures in out/bench/*.json and writes docs/benchmarks.md.

Run it on an idle machine; the document states the ratios, which travel better than the times.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def run_python(name: str, out: Path, threads: int) -> dict:
    path = out / f"{name}.json"
    command = [sys.executable, str(HERE / f"bench_{name}.py"), "--threads", str(threads), "--json", str(path)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    return json.loads(path.read_text(encoding="utf-8"))


def run_grid(binary: Path, out: Path) -> dict:
    print("$", binary, flush=True)
    text = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout
    (out / "grid.json").write_text(text, encoding="utf-8")
    return json.loads(text)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def features() -> str:
    flags = next(
        x for x in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if x.startswith("flags")
    )
    known = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    return ", ".join(name for name in known if name in flags.split())


def document(grid: dict, fake_quantize: dict, ops: dict, step: dict, threads: int) -> str:
    copy_gbs = next(r["read_write_gbs"] for r in grid["results"] if r["what"] == "memcpy")
    shape = fake_quantize["setting"]
    sections = [
        "# Benchmarks\n\n`make bench` measures all of this in one go and writes this page; the raw figures "
        "go to `out/bench/`. Variants of one table share a process and take turns; medians are shown. "
        "Ratios are what to compare: times belong to the machine, "
        f"here {processor()} ({features()}), {threads} threads, torch "
        f"{ops['setting']['torch']}.",
        "## A training step of a language model\n\nForward, cross-entropy and backward of 2 × 256 tokens "
        f"through {step['setting']['layers']} SmolLM2-135M blocks with its 49,152-token head, policy "
        f"`{step['setting']['policy']}`. Ratio to the float Hugging Face model.\n\n"
        + table(
            ["compute", "model", "ms", "ratio"],
            [[r["compute"], r["variant"], f"{r['ms']:.0f}", f"{r['ratio']:.2f}"] for r in step["results"]],
        ),
        "## The matrices alone\n\n`quantized_linear` against the same stack with float weights (forward and "
        "backward, 512 tokens, SmolLM2's shapes, no attention, norms or head to dilute the difference).\n\n"
        + table(
            ["compute", "grid", "float ms", "quantized ms", "ratio (quartiles)"],
            [
                [
                    r["compute"],
                    f"`{r['grid']}`",
                    f"{r['float_ms']:.1f}",
                    f"{r['quantized_ms']:.1f}",
                    f"{r['ratio']:.2f} ({r['ratio_quartiles'][0]:.2f} – {r['ratio_quartiles'][1]:.2f})",
                ]
                for r in ops["results"]
            ],
        ),
        "## One weight fake-quantization\n\n"
        f"{shape['rows']} × {shape['columns']} float32 weights, 4 bits, groups of 32, forward and backward. "
        "torchao trains on a grid of its own; it stands here for its cost.\n\n"
        + table(
            ["variant", "forward ms", "backward ms", "times a copy", "bytes saved a weight"],
            [
                [
                    r["variant"],
                    f"{r['forward_ms']:.2f}",
                    f"{r['backward_ms']:.2f}",
                    f"{r['times_a_copy']:.1f}",
                    f"{r['saved_bytes_per_weight']:.2f}",
                ]
                for r in fake_quantize["results"]
            ],
        ),
        "## The row kernels\n\nFake-quantization on one thread, bytes read plus bytes written a second, "
        'beside memcpy. "bf16": the result is written in bfloat16; "scalar": without AVX2.\n\n'
        + table(
            ["kernel", "GB/s", "of memcpy"],
            [
                [r["what"], f"{r['read_write_gbs']:.1f}", f"{r['read_write_gbs'] / copy_gbs:.0%}"]
                for r in grid["results"]
                if r["what"].startswith(("memcpy", "q", "int"))
            ],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid-binary", type=Path, default=ROOT / "build" / "benchmarks" / "bench_grid")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    grid = run_grid(options.grid_binary, options.out)
    fake_quantize, ops, step = (
        run_python(name, options.out, options.threads) for name in ("fake_quantize", "ops", "step")
    )
    text = document(grid, fake_quantize, ops, step, options.threads)
    (ROOT / "docs" / "benchmarks.md").write_text(text, encoding="utf-8")
    print("docs/benchmarks.md written")


if __name__ == "__main__":
    main()
