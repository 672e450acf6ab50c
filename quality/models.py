"""Checkpoints: a float model rounded by every PTQ method, and trained on its grids. Each is made once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Case
from libqat.cli import console
from texts import BATCH, STEP, WINDOW

import libqat
from libqat import finetune, html_report, run_folder

CALIBRATION = 51_200
"""Tokens that GPTQ and AWQ see: as many as the short runs train on."""
TERMS = ("kl", "ce", "reverse_kl", "jsd", "cakld")
CALIBRATED = {"awq": libqat.awq, "gptq": libqat.gptq, "guided": libqat.guided}


def prepare(model: Path, policy: dict, scale: str) -> tuple[libqat.LoadedModel, libqat.PreparedDecoder]:
    """A model under a policy, with scales by that rule."""
    loaded = libqat.load_model(model)
    return loaded, libqat.prepare(
        loaded.decoder, libqat.Policy.from_json(json.dumps(policy)).with_scale(scale)
    )


class Run(NamedTuple):
    """A finished training run."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """What ships."""
        return self.folder / finetune.CHECKPOINT

    def entry(self) -> dict:
        """How it was made, for summary.json."""
        run = json.loads((self.folder / "run.json").read_text())
        options = run["options"]
        terms = [name for name, weight in options["objective"].items() if weight and name in TERMS]
        steps = html_report.read_telemetry(self.folder / "telemetry.jsonl")
        return {
            "method": "qat",
            "objective": "+".join(terms),
            "learning_rate": options["learning_rate"],
            "scale_learning_rate": options["scale_learning_rate"],
            "estimator": run["policy"].get("estimator"),
            "start": run_folder.read_finetune(self.folder)["start"],
            "steps": options["steps"],
            "train_seconds": STEP * options["steps"] / steps[-1]["tokens_per_second"],
        }


class Maker:
    """Makes what is missing below a folder.

    start_tokens: that starts, GPTQ and AWQ look at, at most; None: as recommended, and CALIBRATION.
    """

    def __init__(self, source: Path, training: torch.Tensor, out: Path, start_tokens: int | None = None):
        self.source, self.training, self.out, self.start_tokens = source, training, out, start_tokens

    def rounded_path(self, case: Case, method: str) -> Path:
        """Where the checkpoint of a PTQ method lies."""
        return self.out / "ptq" / f"{case.name.removesuffix('-256k')}-{method}.qat.safetensors"

    def rounded(self, case: Case, method: str) -> Path:
        """The checkpoint of a PTQ method."""
        path = self.rounded_path(case, method)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            scale = {"rtn": "reference", "search": "search"}.get(method, "learned")
            loaded, prepared = prepare(self.source, case.policy, scale)
            if method in CALIBRATED:
                with console.progress(f"{case.title}: {method}") as update:
                    CALIBRATED[method](prepared, self._calibration(), progress=update)
            libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), path)
        return path

    def round_to_nearest(self, model: Path, policy: dict, path: Path) -> None:
        """A trained model under a policy by the consumers' own rules, with the tokenizer of the float one."""
        loaded, prepared = prepare(model, policy, "reference")
        libqat.save(libqat.freeze(prepared, loaded.config, str(self.source)), path)

    def trained(self, case: Case, seed: int) -> Run:
        """The run of a case, continued when it was interrupted."""
        folder = self.out / "runs" / f"{case.name}-seed{seed}"
        if not (folder / finetune.CHECKPOINT).exists():
            begin = self._kept_start(case) if case.start_of and seed == 0 else {}
            with console.progress(f"{case.title}: starting, seed {seed}") as update:
                run = self._start(case, seed, folder, on_start=update, **begin)
            self._keep_rounded(case, seed, run)
            with console.progress(f"{case.title}: training, seed {seed}") as update:
                run.train(lambda report: update(report.step, report.steps, console.describe(report)))
            (folder / run_folder.STATE).unlink()  # 1.6 GB, of which nothing resumes any more
        return Run(folder)

    def _kept_start(self, case: Case) -> dict[str, Path]:
        """What takes up the start that runs with seed 0 share, which is made if it is not there yet."""
        path = self.out / "starts" / f"{case.start_of}.safetensors"
        if not path.exists():
            with console.progress(f"{case.start_of}: the start that runs share") as update:
                self._start(replace(case, options={}), 0, None, on_start=update, save_start=path)
        return {"start": path}

    def _keep_rounded(self, case: Case, seed: int, run: finetune.Run) -> None:
        """A short run with seed 0 starts from what its method is judged by, from the same windows."""
        path = self.rounded_path(case, run.start)
        same = seed == 0 and case.steps * STEP == CALIBRATION and run.trainer.step == 0
        if same and run.start in case.ptq and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            libqat.save(run.prepared.freeze(run.loaded.config, run.loaded.tokenizer), path)

    def _start(self, case: Case, seed: int, folder: Path | None, **options: Any) -> finetune.Run:
        if not case.options and "start" not in options:  # recommended, and made here: all ask the same
            options["calibration_cache"] = self.out / "starts" / f"seed{seed}.calibration.safetensors"
        return finetune.start(
            self.source,
            self.training,
            case.policy,
            folder or "",
            resume=folder is not None and (folder / run_folder.STATE).exists(),
            steps=case.steps,
            batch_size=BATCH,
            sequence_length=WINDOW,
            frozen=list(finetune.FROZEN),
            seed=seed,
            start_tokens=self.start_tokens,
            **options | case.options,
        )

    def _calibration(self) -> torch.Tensor:
        """The windows that a run with seed 0 trains on first, int64[n, WINDOW]."""
        data = libqat.TokenData.from_tensor(self.training, int(self.training.max()) + 1)
        steps = min(CALIBRATION, self.start_tokens or CALIBRATION) // STEP
        return torch.cat([data.batch(step, BATCH, WINDOW, 0) for step in range(steps)])
