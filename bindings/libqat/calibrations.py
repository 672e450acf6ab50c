"""Calibration that is kept: what a start needs of the float model alone, for runs under several policies.

Writing text and the backward pass take more than half of a guided start's time, and know nothing of grids.
`libqat finetune --calibration-cache FILE` keeps both; runs of the same model, text and seed under other
policies take them up, and start from the same bits as without it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import _core, generation
from . import teacher as teachers
from ._core import Decoder, FileError, LoadedModel, PreparedDecoder, TokenData
from ._files import new_file
from .layer_rounding import Progress
from .layer_sensitivity import Sensitivity

__all__ = ["CalibrationCache", "first_windows", "of_run", "windows"]

_KEY = "libqat_calibration"
_GENERATED = "generated"
_PARTS = Sensitivity._fields


class CalibrationCache:
    """Text that a model wrote, and how much its layers' tokens and outputs count, in one safetensors file.

    path: of the file, which need not be there. model: `_core.fingerprint` of the float weights and all else
    that its answers depend on. text: int64 [n, T], the windows of the training text. settings: further ones
    that the content depends on, by name. FileError naming the path for a file of another model, text or
    setting, and for what is no such file.
    """

    def __init__(self, path: str | os.PathLike, model: int, text: Tensor, settings: Mapping[str, Any]):
        self.path = Path(path)
        digest = hashlib.sha256(text.contiguous().numpy().tobytes()).hexdigest()[:16]
        read = f"{' x '.join(map(str, text.shape))} tokens {digest}"
        self._made_of = {"model": f"{model:016x}"} | dict(settings) | {"text": read}
        self._weights: set[str] = set()
        self._tensors: dict[str, Tensor] = {}
        if self.path.exists():
            self._read()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def generated(self, write: Callable[[], Tensor]) -> Tensor:
        """The windows that the float model wrote, int64 [n, T], by `write` if they are not there yet."""
        if _GENERATED not in self._tensors:
            self._tensors[_GENERATED] = write()
            self._save()
        return self._tensors[_GENERATED]

    def sensitivity(self, prepared: PreparedDecoder, measure: Callable[[], Sensitivity]) -> Sensitivity:
        """Of all weights that the policy rounds, by `measure` if one of them is not there yet."""
        wanted = {name.removesuffix("_scales") for name, _ in prepared.scale_parameters()}
        if not wanted <= self._weights:
            found = measure()
            self._weights |= wanted
            for part, tensors in found._asdict().items():
                self._tensors |= {f"{part}/{name}": tensor for name, tensor in tensors.items()}
            self._save()
        return Sensitivity(*(self._part(part, wanted) for part in _PARTS))

    def _part(self, part: str, wanted: Iterable[str]) -> dict[str, Tensor]:
        keys = {name: f"{part}/{name}" for name in wanted}
        return {name: self._tensors[key] for name, key in keys.items() if key in self._tensors}

    def _read(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                made_of, weights = _described(self.path, file.metadata())
                self._check(made_of)
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileError:  # an OSError, too
            raise
        except (OSError, SafetensorError) as error:
            raise FileError(
                f"calibration_cache: {self.path}: expected a safetensors file, got {error}"
            ) from error
        self._weights = weights

    def _check(self, made_of: Mapping[str, Any]) -> None:
        for name, own in self._made_of.items():
            if made_of.get(name) != own:
                got = made_of.get(name)
                raise FileError(
                    f"calibration_cache: {self.path}: {name}: expected this run's {own}, got {got}"
                )

    def _save(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        metadata = {_KEY: json.dumps({"made_of": self._made_of, "weights": sorted(self._weights)})}
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors.items()}
        try:
            with new_file(self.path, "calibration_cache") as file:
                save_file(tensors, file, metadata)
        except SafetensorError as error:
            raise FileError(
                f"calibration_cache: {self.path}: expected a writable file, got {error}"
            ) from error


def _described(path: Path, metadata: Mapping[str, str] | None) -> tuple[dict[str, Any], set[str]]:
    """What the file was made of, and the weights that were asked for."""
    try:
        found = json.loads((metadata or {})[_KEY])
        made_of, weights = dict(found["made_of"]), set(found["weights"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        got = sorted(metadata or {})
        raise FileError(
            f"calibration_cache: {path}: {_KEY}: expected metadata of a calibration, got {got}"
        ) from error
    return made_of, weights


def of_run(
    path: str | os.PathLike, loaded: LoadedModel, text: Tensor, share: float, options: Mapping[str, Any]
) -> CalibrationCache:
    """The cache of a run's start. loaded: while it still is the float model; text: see `first_windows`."""
    settings = {
        "generated": share,
        "seed": options["seed"],
        "compute_dtype": _core.compute_dtype(options["compute_dtype"]),
    }
    return CalibrationCache(path, _core.fingerprint(loaded.decoder, loaded.config), text, settings)


def first_windows(data: TokenData, options: Mapping[str, Any], tokens: int, share: float) -> Tensor:
    """What the run reads first, each window once: int64 [n, sequence_length].

    At most what leaves `share` of `tokens` to the float model, but a window.
    """
    length = options["sequence_length"]
    batches, most = options["steps"] * options["accumulate"], max(1, int(tokens * (1 - share)) // length)
    chosen = data.first_windows(batches, options["batch_size"], length, options["seed"], most=most)
    return data.read(chosen, length)


def windows(
    loaded: LoadedModel,
    model: str | os.PathLike,
    text: Tensor,
    share: float,
    options: Mapping[str, Any],
    *,
    teacher: Decoder | None = None,
    cache: CalibrationCache | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """What a start looks at, int64 [n, sequence_length] each: `share` of it by the float model.

    loaded: the model in `model`, still float; teacher: a frozen copy of it, if there is one.
    """
    if not share:
        return {"text": text}

    def write() -> Tensor:
        writer = teacher or teachers.float_copy(loaded, options["compute_dtype"])
        return generation.of_model(
            loaded, model, text, share, writer, seed=options["seed"], progress=progress
        )

    return {"text": text, _GENERATED: write() if cache is None else cache.generated(write)}
