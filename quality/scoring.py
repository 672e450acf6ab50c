"""Models beside the float one on the judged texts, each measured once and remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from libqat.cli import console

import libqat

GROUP = 6
"""Models that are in memory at a time; they share one pass of the float model."""


def fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:16]


class Scores:
    """{text: {"tokens", "float": figures, row: figures}} by checkpoint, kept in a folder."""

    def __init__(self, folder: Path, source: Path, judged: Mapping[str, torch.Tensor], window: int):
        self.folder, self.source, self.judged, self.window = folder, source, judged, window
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, paths: Mapping[str, Path]) -> dict[str, dict]:
        """Name of a checkpoint -> text -> {"tokens", "float", "model"}, scored in float32.

        Figures: {"nll", "ppl", "kl", "top1", "window_nll", "window_kl"}; windows are for paired intervals.
        """
        kept = {name: self._kept(path) for name, path in paths.items()}
        missing = [name for name, path in kept.items() if not path.exists()]
        for start in range(0, len(missing), GROUP):
            part = missing[start : start + GROUP]
            self._measure({name: paths[name] for name in part}, {name: kept[name] for name in part})
        return {name: json.loads(path.read_text()) for name, path in kept.items()}

    def _kept(self, path: Path) -> Path:
        tokens = "-".join(f"{name}{len(stream)}" for name, stream in self.judged.items())
        return self.folder / f"{fingerprint(path)}-{tokens}.json"

    def _measure(self, paths: Mapping[str, Path], to: Mapping[str, Path]) -> None:
        reference = libqat.open_model(self.source, "float").decoder
        models = [libqat.open_model(path, name).decoder for name, path in paths.items()]
        found: dict[str, dict] = {name: {} for name in paths}
        for text, tokens in self.judged.items():
            with console.progress(f"scoring {len(models)} on {text}") as update:
                scores = libqat.compare(
                    reference,
                    models,
                    tokens,
                    window=self.window,
                    progress=lambda done, total, u=update: u(done, total),
                )
            for name, score in zip(paths, scores[1:], strict=True):
                found[name][text] = {
                    "tokens": scores[0].tokens,
                    "float": figures(scores[0]),
                    "model": figures(score),
                }
        for name, path in to.items():
            path.write_text(json.dumps(found[name]) + "\n")


def figures(score: libqat.Score) -> dict:
    """A score as plain numbers."""
    return {
        "nll": score.nll,
        "ppl": score.perplexity,
        "kl": score.kl,
        "top1": score.top1,
        "window_nll": list(score.window_nll),
        "window_kl": list(score.window_kl),
    }
