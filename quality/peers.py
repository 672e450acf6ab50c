"""The same training with torchao, served the way its users serve it: both judged by llama.cpp itself."""

from __future__ import annotations

from pathlib import Path

import served
import tables
import torch
import torchao_peer
from cases import Case, named
from libqat.cli import console
from models import Maker
from texts import BATCH, STEP, TITLES, WINDOW

import libqat

LEARNING_RATES = (5e-5, 1e-4, 2e-4)
"""Tried for torchao; its best counts."""
WINDOWS = 16
"""Of each text, judged by llama.cpp: every token costs it a step."""
TITLE = "Judged by llama.cpp, beside torchao"
SECTION = (
    f"## {TITLE}\n"
    + """

Q4_0 files, {eval_tokens:,} tokens of each text, every figure computed by llama.cpp ({llama_cpp}). torchao
trains int4 groups of 32 with the same tokens, loss, optimizer and schedule; then, as its users do, weights
are converted, dequantized and made Q4_0 by llama.cpp's own rule. Several learning rates, in its favour. Nats
above the float model, with 95 % intervals over windows.

"""
)


def gguf_of(checkpoint: Path, path: Path) -> Path:
    """The exported file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        libqat.export(libqat.load(checkpoint), path)
    return path


def torchao_checkpoint(maker: Maker, case: Case, rate: float, seed: int) -> Path:
    """torchao's trained weights, dequantized and put on the case's grids by the consumer's own rule."""  # noqa: D403
    folder = maker.out / "torchao" / f"{case.name}-{rate:g}-seed{seed}"
    path = folder / "requantized.qat.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = libqat.TokenData.from_tensor(maker.training, int(maker.training.max()) + 1)
        batches = [data.batch(step, BATCH, WINDOW, seed) for step in range(case.steps)]
        trained = torchao_peer.train(maker.source, batches, folder, rate, seed)
        maker.round_to_nearest(trained, case.policy, path)
    return path


def rows(maker: Maker, judged: dict[str, torch.Tensor], name: str = "q4_0", seed: int = 0) -> list[dict]:
    """{"case", "text", "model", "nats", ...}: loss above the float model's, all computed by llama.cpp."""
    case = named(name)
    files = {"float": maker.source}
    files["rtn"] = gguf_of(maker.rounded(case, "rtn"), maker.out / "gguf" / f"{name}-rtn.gguf")
    files["libqat"] = gguf_of(
        maker.trained(case, seed).checkpoint, maker.out / "gguf" / f"{name}-libqat-{seed}.gguf"
    )
    if torchao_peer.available():
        for rate in LEARNING_RATES:
            key = f"torchao {torchao_peer.version()}, {rate:g}"
            checkpoint = torchao_checkpoint(maker, case, rate, seed)
            files[key] = gguf_of(checkpoint, maker.out / "gguf" / f"{name}-torchao-{rate:g}-{seed}.gguf")
    else:
        console.say("torchao is not installed: its rows are left out")
    found = []
    for text, tokens in judged.items():
        some = tokens[: WINDOWS * WINDOW]
        scores = {key: served.nats(path, some, WINDOW, maker.out / "scores") for key, path in files.items()}
        for key, score in scores.items():
            nats = [a - b for a, b in zip(score["window_nll"], scores["float"]["window_nll"], strict=True)]
            low, high = libqat.mean_interval(nats)
            entry = {"case": name, "text": text, "model": key, "tokens": case.steps * STEP, "seed": seed}
            entry |= {"eval_tokens": score["tokens"], "ppl": score["ppl"], "nats": sum(nats) / len(nats)}
            found.append(entry | {"nats_interval": [low, high], "llama_cpp": score["version"]})
    return found


def section(found: list[dict]) -> str:
    """The Markdown of the rows."""
    lines = [
        [
            TITLES[row["text"]],
            row["model"],
            f"{row['ppl']:.2f}",
            f"{row['nats']:.3f} ({row['nats_interval'][0]:.3f} – {row['nats_interval'][1]:.3f})",
        ]
        for row in found
    ]
    return SECTION.format(**found[0]) + tables.table(["text", "model", ">perplexity", ">nats"], lines)
