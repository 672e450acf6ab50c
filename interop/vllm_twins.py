"""Compressed Tensors folders in vLLM on the CPU: packed codes against their dense twin.

    make interop-vllm                       # tiny models and SmolLM2-135M; writes out/interop/vllm.json
    make interop-vllm ARGS="--tiny"

Each checkpoint becomes two folders: the packed one, and one with the same numbers dequantized to bfloat16.
vLLM, in a virtual environment of its own, must give the prompts nearly the same probabilities from both, and
continue them with the same tokens up to a tie: the order of sums is all that may differ. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import torch
from libqat.cli import console, program

import libqat
from libqat import data, run_folder

PROGRAM = Path(__file__).with_name("vllm_cpu.py")
FLOAT_ACTIVATIONS = {"VLLM_CPU_INT4_W4A8": "0"}
"""On a CPU with AMX vLLM's default is to round the inputs of 4-bit layers to 8 bits."""
TEXTS = [
    "The capital of France is",
    "Water is made of hydrogen and",
    "Once upon a time, in a small village by the sea, there lived",
    "A lighthouse is a tower that sends out light from lamps and lenses, so that sailors know at night where "
    "they are. Most stand on the coast, on rocks or at the mouth of a harbour. The first ones burned wood, "
    "later ones oil and gas, and today nearly all are electric and work by themselves. Before that, a keeper "
    "lived in the tower, trimmed the wick, wound up the clockwork that turned the lens, and wrote down the "
    "weather. Each lighthouse flashes in a rhythm of its own, which is printed on the charts, so that",
]


class Case(NamedTuple):
    """A checkpoint, and what vLLM is asked about it."""

    name: str
    checkpoint: libqat.QuantizedCheckpoint
    prompts: list
    largest: float
    """Nats that a token's log-probability may differ. 8-bit activations, for comparison, move it by more."""


def tiny(grid: str) -> Case:
    """A random Llama, its linears on `grid`; q has twice the heads of k and v, which vLLM computes as one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,  # large enough that the likeliest token leads by more than bfloat16 rounds
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    rules = [
        {"match": r"model\.embed_tokens|lm_head", "weight": "bf16"},
        {"match": ".*_proj", "weight": grid},
    ]
    prepared = libqat.prepare(LlamaForCausalLM(config).float(), {"rules": rules})
    checkpoint = libqat.freeze(prepared, tokenizer="none")
    prompts = torch.randint(320, (4, 64)).tolist()
    return Case(f"tiny llama, {grid}", checkpoint, prompts, largest=0.05)


def smollm2() -> Case:
    """SmolLM2-135M, rounded without training.

    Its probabilities depend much on the order of sums: vLLM's dense kernels with and without AMX differ by
    0.28 nats from each other.
    """
    loaded = libqat.load_model(data.smollm2_gguf())
    prepared = libqat.prepare(loaded.decoder, "ct-w4a16")
    checkpoint = libqat.freeze(prepared, loaded.config, loaded.tokenizer)
    return Case("SmolLM2-135M, ct-w4a16", checkpoint, TEXTS, largest=0.5)


def ask(options: argparse.Namespace, folder: Path, prompts: list, **environment: str) -> dict:
    """What vLLM computes from `folder`."""
    request, result, log = (folder.with_suffix(end) for end in (".request.json", ".result.json", ".log"))
    request.write_text(json.dumps({"folder": str(folder), "prompts": prompts, "tokens": options.tokens}))
    result.unlink(missing_ok=True)
    variables = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **environment}
    command = [options.python, "-I", PROGRAM, request, result]  # -I: nothing of this program's packages
    with log.open("w") as lines:
        status = subprocess.run(command, env=variables, stdout=lines, stderr=lines, check=False).returncode
    if status != 0:
        raise libqat.Error(f"vllm: {folder}: expected exit code 0, got {status}; see {log}")
    return json.loads(result.read_text())


def apart(one: dict, other: dict) -> float:
    """The largest difference of a prompt token's log-probability, in nats."""
    pairs = zip(one["answers"], other["answers"], strict=True)
    return max(abs(a - b) for p, q in pairs for a, b in zip(p["scores"], q["scores"], strict=True))


def same(one: dict, other: dict, tie: float = -math.inf) -> int:
    """Prompts that both continue with the same tokens, to the end or to two at most `tie` nats apart."""

    def agree(p: dict, q: dict) -> bool:
        for a, b, likeliest in zip(p["tokens"], q["tokens"], q["likeliest"], strict=False):
            if a != b:
                return likeliest[str(b)] - likeliest.get(str(a), -math.inf) <= tie
        return True

    return sum(agree(p, q) for p, q in zip(one["answers"], other["answers"], strict=True))


def compare(case: Case, options: argparse.Namespace) -> dict:
    """One row of the table."""
    folders = options.out / "vllm" / case.name.replace(", ", "-").replace(" ", "-").replace(":", "-")
    folders.mkdir(parents=True, exist_ok=True)
    packed, dense = folders / "packed", folders / "dense"
    libqat.export(case.checkpoint, packed, target="compressed-tensors", overwrite=True)
    libqat.export(case.checkpoint, dense, target="hf", dtype="bfloat16", overwrite=True)
    ours = ask(options, packed, case.prompts, **FLOAT_ACTIVATIONS)
    twin = ask(options, dense, case.prompts)
    default = ask(options, packed, case.prompts)
    return {
        "model": case.name,
        "prompts": len(case.prompts),
        "same_tokens": same(ours, twin),
        "scored_tokens": sum(len(answer["scores"]) for answer in ours["answers"]),
        "largest_difference": apart(ours, twin),
        # Each of two tokens may move by the largest difference.
        "passed": apart(ours, twin) <= case.largest
        and same(ours, twin, 2 * case.largest) == len(case.prompts),
        "default_activations": {
            "same_tokens": same(default, twin),
            "largest_difference": apart(default, twin),
        },
        "megabytes": {path.name: size(path) for path in (packed, dense)},
        "kernels": {"packed": ours["kernels"], "dense": twin["kernels"]},
        "texts": [answer["text"] for answer in ours["answers"]],
        "version": ours["version"],
    }


def size(folder: Path) -> float:
    """Of the tensors, in MB."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def table(rows: list[dict]) -> str:
    lines = [
        "| model | MB packed | MB dense | same tokens | largest difference | by vLLM's default |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["model"],
            *(f"{row['megabytes'][part]:.1f}" for part in ("packed", "dense")),
            f"{row['same_tokens']} of {row['prompts']} prompts",
            f"{row['largest_difference']:.4f}",
            f"{row['default_activations']['largest_difference']:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/interop"))
    parser.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"), help="that has vLLM")
    parser.add_argument("--tiny", action="store_true", help="no SmolLM2")
    parser.add_argument("--tokens", type=int, default=24, help="that follow each prompt")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    begin = time.monotonic()
    options = parse()
    options.out, options.python = options.out.absolute(), options.python.absolute()
    torch.set_num_threads(options.threads)
    cases = [lambda: tiny("int4_g32@bf16:bf16"), lambda: tiny("int4_g128@bf16:bf16"), smollm2]
    cases = cases[: 2 if options.tiny else 3]
    rows = []
    with console.progress("vLLM") as update:
        for number, make in enumerate(cases):
            case = make()
            update(number, len(cases), case.name)
            rows.append(compare(case, options))
        update(len(cases), len(cases))
    run_folder.write_json(options.out / "vllm.json", rows)
    print(table(rows))
    wrong = [row for row in rows if not row["passed"]]
    console.say(f"{len(rows)} models, {len(wrong)} differ, {console.clock(time.monotonic() - begin)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    program.run(main, interrupted="interrupted")
