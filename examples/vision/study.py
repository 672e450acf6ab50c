"""One network on one set of images under several policies: PTQ and QAT, scored from the saved checkpoints."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from libqat.cli import console
from torch import Tensor, nn

import libqat
from libqat import run_folder

from . import qat

LAYER_IMAGES = 64
"""Held-out images on which the layers' outputs are compared."""


@dataclass
class Study:
    """What is trained on, what is scored, and how."""

    name: str
    network: nn.Module
    """The float network: where training starts, and the teacher."""
    training: Tensor
    held_out: Tensor
    score: Callable[[Tensor], dict]
    """Figures of the held-out images' logits."""
    folder: Path
    options: qat.Training

    def row(self, title: str, policy: Mapping | str, learning_rate: float) -> dict:
        """PTQ and QAT under one policy."""
        options = replace(self.options, learning_rate=learning_rate)
        images = digest(self.training, self.held_out)
        settings = {"network": digest(*self.network.state_dict().values()), "images": images}
        settings |= {"policy": policy, **asdict(options)}
        slug = "".join(c if c.isalnum() else "-" for c in f"{self.name} {title}")
        return once(
            self.folder / f"{slug}.json", settings, lambda: self._measure(title, policy, options, slug)
        )

    def _measure(self, title: str, policy: Mapping | str, options: qat.Training, slug: str) -> dict:
        prepared = qat.attach(self.network, policy, options.batch_norm)
        report = prepared.report()
        ptq = self._shipped(prepared, self.folder / f"{slug}.ptq.safetensors")
        teacher = qat.shell(self.network, "fold")
        with console.progress(f"{self.name}: {title}") as update:
            qat.train(prepared, teacher, self.training, options, update)
        trained = self._shipped(prepared, self.folder / f"{slug}.qat.safetensors")
        return {
            "policy": title,
            "bits_per_weight": report.bits_per_weight,
            "bytes": report.bytes,
            "ptq": ptq,
            "qat": trained,
        }

    def _shipped(self, prepared: libqat.PreparedModel, path: Path) -> dict:
        """Figures of the network that is read back from the checkpoint written here."""
        qat.save(prepared, path)
        exact = qat.shell(self.network, self.options.batch_norm)
        read = qat.load(path, exact)
        logits = qat.logits_of(read, self.held_out)
        live = qat.logits_of(prepared.model, self.held_out)
        names = [slot.name.removesuffix(".weight") for slot in prepared.slots]
        errors = qat.layer_errors(exact, read, names, self.held_out[:LAYER_IMAGES])
        return {
            **self.score(logits),
            "logits_differing_from_live": int((logits != live).sum()),
            "mean_layer_error": sum(errors.values()) / len(errors),
            "layer_errors": errors,
            "checkpoint": str(path),
        }


def once(path: Path, settings: dict, compute: Callable[[], dict]) -> dict:
    """`compute()`, kept in a JSON file: the same settings find it again after an interruption."""
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["result"]
    result = compute()
    run_folder.write_json(path, {"settings": settings, "result": result})
    return result


def digest(*tensors: Tensor) -> str:
    """Tells the numbers of one run from those of another."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()
