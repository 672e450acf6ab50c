"""Starts that are kept: where a PTQ method left a prepared model, for several runs from there.

A start can take longer than the training behind it. `libqat finetune --save-start FILE` keeps it, and
`--start FILE` goes on from it, with other rates, seeds or losses: the same bits as the first time.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._core import ArgumentError, FileError, PreparedDecoder
from ._files import new_file

__all__ = ["Start", "load_start", "save_start"]

_KEY = "libqat_start"
_SCALES = "_scales"


class Start(NamedTuple):
    """How a start was made."""

    method: str
    """The PTQ method."""
    calibration: dict[str, int]
    """Tokens that it saw: {"text": of the training text, "generated": written by the float model}."""


def save_start(prepared: PreparedDecoder, start: Start, path: str | os.PathLike) -> None:
    """Writes latents and learned scales of the quantized tensors, float32, as safetensors.

    The file appears whole or not at all. FileError naming the path.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {_KEY: json.dumps({"method": start.method, "calibration": start.calibration})}
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(prepared).items()}
    try:
        with new_file(path, "save_start") as file:
            save_file(tensors, file, metadata)
    except SafetensorError as error:
        raise FileError(f"save_start: {path}: expected a writable file, got {error}") from error


@torch.no_grad()
def load_start(prepared: PreparedDecoder, path: str | os.PathLike) -> Start:
    """Makes what `save_start` wrote the latents and scales of a prepared model, and says how it was made.

    prepared: the same model under a policy with the same grids and learned scales. FileError naming the
    tensor that is missing, unknown or of another shape; nothing is changed then.
    """
    from safetensors import SafetensorError, safe_open

    own = _tensors(prepared)
    try:
        with safe_open(path, "pt") as file:
            start = _described(path, file.metadata())
            _check(path, own, {name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
            for name, tensor in own.items():
                tensor.copy_(file.get_tensor(name))
    except FileError:  # an OSError, too
        raise
    except (OSError, SafetensorError) as error:
        raise FileError(f"load_start: {path}: expected what save_start wrote, got {error}") from error
    return start


def _tensors(prepared: PreparedDecoder) -> dict[str, torch.Tensor]:
    weights = prepared.decoder.parameters()
    scales = dict(prepared.scale_parameters())
    return {name: weights[name] for name in (key.removesuffix(_SCALES) for key in scales)} | scales


def _described(path: str | os.PathLike, metadata: Mapping[str, str] | None) -> Start:
    try:
        found = json.loads((metadata or {})[_KEY])
        start = Start(found["method"], found["calibration"])
        known = isinstance(start.method, str) and all(
            isinstance(key, str) and isinstance(count, int) for key, count in start.calibration.items()
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        known = False
    if not known:
        got = sorted(metadata or {})
        raise FileError(f"load_start: {path}: {_KEY}: expected metadata that save_start wrote, got {got}")
    return start


def _check(path: str | os.PathLike, own: Mapping[str, torch.Tensor], found: Mapping[str, Any]) -> None:
    for name in (*own, *found):
        want = list(own[name].shape) if name in own else None
        got = [found[name].get_dtype(), *found[name].get_shape()] if name in found else None
        if want is None or got != ["F32", *want]:
            raise FileError(
                f"load_start: {path}: {name}: expected {'none' if want is None else f'float32 {want}'}, got "
                f"{'none' if got is None else f'{got[0]} {got[1:]}'}"
            )


def path_of(start: str) -> Path | None:
    """The file, where a start is not a method's name."""
    return Path(start) if start.endswith(".safetensors") else None


def check_writable(path: str | os.PathLike, start: str) -> None:
    """Refuses early what `save_start` would refuse after a long start; makes the folder."""
    if start == "none":
        raise ArgumentError('save_start: expected a start that can be kept, got "none"')
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"save_start: {path}: expected a writable file, got {error.strerror}") from error
