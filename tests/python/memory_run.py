"""Trains a few steps and prints what the process held beyond what it had before. argv[1]: settings as JSON.

A process of its own, because the peak of memory is that of a process.
"""

import json
import sys
from pathlib import Path

import torch
from libqat.teacher import share_frozen

import libqat
from libqat import _core


def held(field: str) -> int:
    """Bytes by /proc/self/status: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def train(folder: str, policy: dict, options: dict, teacher: str, tokens: torch.Tensor) -> None:
    """As finetune.start without a run folder."""
    loaded = libqat.load_model(folder)
    data = _core.TokenData.from_tensor(tokens, json.loads(loaded.config)["vocab_size"])
    dtype = getattr(torch, options["compute_dtype"])
    live = loaded.decoder.frozen_copy(dtype) if teacher == "live" else None
    prepared = libqat.prepare(loaded.decoder, policy)
    trainer = libqat.Trainer(prepared, live, data, "", **options)
    if live is not None:
        share_frozen(live, loaded.decoder)
    trainer.run(lambda report: report.step < options["steps"])


def main() -> None:
    """Once with the tiny model, so that libraries, threads and caches are there; then the measured run."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    tokens = torch.randint(
        0, settings["vocabulary"], (settings["tokens"],), generator=torch.Generator().manual_seed(0)
    )
    common = (settings["policy"], settings["options"], settings["teacher"], tokens)
    train(settings["warm_up"], *common)
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
    train(settings["model"], *common)
    print(held("VmHWM") - before)


if __name__ == "__main__":
    main()
