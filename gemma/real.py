"""Gemma 3 270M: read from GGUF, rounded, trained on the Q4_0 grid, exported, scored by llama.cpp."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from libqat.cli import console

import libqat
from libqat import data, finetune, llama_cpp, run_folder

POLICY = "gguf-q4_0"
WINDOW = 256
STEPS = 40
BATCH = 2
START = "gptq"
LEARNING_RATE = 1e-5
"""A twentieth of what other models take: this one is 640 wide, with gains up to 700."""
EVALUATED = 2048
"""Tokens of each text."""
JUDGED = 201
"""Tokens that llama.cpp scores, the beginning included."""
PROMPT = "The sun rises in the east because"
TITLES = {"wiki": "held-out Wikipedia", "other": "Python reference"}


def run(source: Path, out: Path) -> dict[str, Any]:
    """All figures of the model; an interrupted run continues."""
    out.mkdir(parents=True, exist_ok=True)
    training, texts = _texts(source)
    trained = _train(source, training, out)
    train_peak = _peak()
    gguf = out / "gemma-3-270m-qat-q4_0.gguf"
    checkpoint = libqat.load(trained)
    libqat.export(checkpoint, gguf, name="Gemma 3 270M QAT Q4_0")
    differences = libqat.verify(gguf, checkpoint)
    found = {
        "model": "gemma-3-270m",
        "policy": POLICY,
        "start": START,
        "steps": STEPS,
        "tokens": STEPS * BATCH * WINDOW,
        "learning_rate": LEARNING_RATE,
        "differences": len(differences),
        "bytes": gguf.stat().st_size,
        "texts": _score(source, trained, texts, out),
        "llama_cpp": _judge(gguf, trained, texts["wiki"][:JUDGED]),
    }
    return found | {"train_peak_bytes": train_peak, "peak_bytes": _peak()}


def _peak() -> int:
    """Most bytes that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _texts(source: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Training tokens, and the evaluation tokens of each text; every window begins with <bos>."""
    console.say("Gemma 3 270M: reading the tokenizer and the texts")
    tokenizer, beginning = libqat.load_tokenizer(source), libqat.beginning_of_text(source)
    articles, held_out = data.wikipedia()

    def begun(texts: list[str], limit: int | None = None) -> torch.Tensor:
        return data.begin_windows(data.tokenize(tokenizer, texts, limit), beginning, WINDOW)

    spread = {
        name: data.spread_windows(begun(texts), EVALUATED, WINDOW)
        for name, texts in (("wiki", held_out), ("other", data.python_topics()))
    }
    return begun(articles, 2 * STEPS * BATCH * WINDOW), spread


def _train(source: Path, tokens: torch.Tensor, out: Path) -> Path:
    folder = out / "run"
    if (folder / finetune.CHECKPOINT).exists():
        return folder / finetune.CHECKPOINT
    resume = (folder / run_folder.STATE).exists()
    with console.progress("Gemma 3 270M: loading, rounding") as update:
        loop = finetune.start(
            source,
            tokens,
            POLICY,
            folder,
            resume=resume,
            start=START,
            on_start=update,
            steps=STEPS,
            batch_size=BATCH,
            sequence_length=WINDOW,
            learning_rate=LEARNING_RATE,
            frozen=list(finetune.FROZEN),
            save_every=10,
        )
    if not resume:
        libqat.save(loop.prepared.freeze(loop.loaded.config, loop.loaded.tokenizer), _start_file(out))
    with console.progress("Gemma 3 270M: fine-tuning on the Q4_0 grid") as update:
        loop.train(lambda report: update(report.step, report.steps, console.describe(report)))
    return loop.checkpoint


def _start_file(out: Path) -> Path:
    return out / "start.qat.safetensors"


def _rounded(source: Path, out: Path) -> Path:
    """The same grids, to the nearest."""
    path = out / "rtn.qat.safetensors"
    loaded = libqat.load_model(source)
    prepared = libqat.prepare(loaded.decoder, POLICY)
    libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), path)
    return path


def _score(source: Path, trained: Path, texts: Mapping[str, torch.Tensor], out: Path) -> dict[str, Any]:
    """Perplexity and KL to the float model of each row on each text, in float32."""
    paths = {"float": source, "ptq": _rounded(source, out), START: _start_file(out), "qat": trained}
    models = [libqat.open_model(path, row) for row, path in paths.items()]
    task = libqat.EvaluationTask(texts=texts, window=WINDOW, batch=1)  # logits of 262,144 tokens are large
    found = libqat.evaluate(models, task, stage=console.progress)
    return {
        entry["name"]: {row["row"]: {key: row[key] for key in ("ppl", "kl", "top1")} for row in entry["rows"]}
        for entry in found["texts"]
    }


def _judge(gguf: Path, trained: Path, tokens: torch.Tensor) -> dict[str, Any]:
    """llama.cpp on the exported file: its score of the very tokens that ours scores, and a sentence."""
    decoder = libqat.open_model(trained).decoder
    with console.progress("Gemma 3 270M: scoring in llama.cpp") as update:
        return llama_cpp.judge(gguf, decoder, tokens, PROMPT, n_tokens=30, progress=update)
