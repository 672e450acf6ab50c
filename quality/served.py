"""Files as llama.cpp computes them: its own log-probabilities on the judged windows."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from libqat.cli import console
from scoring import fingerprint

from libqat import llama_cpp


def nats(gguf: Path, tokens: torch.Tensor, window: int, folder: Path, threads: int = 2) -> dict:
    """{"tokens", "nll", "ppl", "window_nll", "version"} of a file, kept in `folder`; slow, a step a token."""
    key = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:8]
    kept = folder / f"llama-cpp-{fingerprint(gguf)}-{key}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    windows = tokens.split(window)
    means = []
    with (
        llama_cpp.LlamaCpp(gguf, threads=threads, context=window + 8) as llama,
        console.progress(f"llama.cpp scores {gguf.name}") as update,
    ):
        for number, part in enumerate(windows, start=1):
            found = llama.score(part.tolist())
            means.append(-sum(found) / len(found))
            update(number, len(windows), f"perplexity {math.exp(sum(means) / len(means)):.2f}")
    mean = sum(means) / len(means)
    result = {
        "tokens": len(tokens) - len(windows),
        "nll": mean,
        "ppl": math.exp(mean),
        "window_nll": means,
        "version": llama_cpp.version(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result) + "\n")
    return result
