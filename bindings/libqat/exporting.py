"""Checkpoints as what a consumer opens: `libqat.export`."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from . import _core
from ._core import ArgumentError, QuantizedCheckpoint
from .tokenizer_files import write_tokenizer_files

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(
    checkpoint: QuantizedCheckpoint,
    path: str | os.PathLike,
    target: str = "gguf",
    tokenizer_from: str | os.PathLike | None = None,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    require_exact: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint as the file or folder that a consumer opens.

    "gguf" packs codes and scales for llama.cpp, Ollama and LM Studio; "compressed-tensors" for transformers
    and vLLM; "gemma-mobile" for transformers; "mlx" for mlx-lm. "hf" writes a Hugging Face folder with the
    dequantized weights; its libqat.json (and README.md) says whether a program that quantizes them again gets
    back what was trained, see `requantization_report`. What a target cannot hold exactly is refused, see
    `can_export`. Static activation scales that it has no place for are left out with a warning (see
    `left_out`), and what its consumer does not open by itself, or what stays float for want of a place, is
    written with one (see `cautions`). Files and folders appear whole or not at all; the same checkpoint gives
    the same bytes.

    Args:
        checkpoint: what `freeze` or `load` returned, with the model's configuration.
        path: the file or folder to write.
        target: one of `export_targets()`.
        tokenizer_from: a GGUF, a tokenizer.json, a Hugging Face directory, or "none" for no tokenizer
            (llama.cpp loads such a GGUF, but its server needs one); by default the checkpoint's reference.
        name: the name that the file gives the model; by default the configuration's.
        progress: called with bytes written and bytes in all.
        dtype: "hf", "compressed-tensors", "gemma-mobile": the model's type, "bfloat16", "float16" or
            "float32"; by default the narrowest that holds every number exactly.
        max_shard_size: folders: bytes per file, as a number or like "5GB"; by default transformers' 50 GB.
        require_exact: "hf": refuse, listing the tensors, unless requantizing gives back codes and scales.
        overwrite: folders: replace an earlier export that holds nothing else.

    Raises:
        ArgumentError: unknown target or dtype, no tokenizer, incomplete checkpoint or configuration.
        UnsupportedError: what the target cannot hold; the message names the tensor.
        FileError: the file cannot be written, something else is there, or the tokenizer cannot be read.
    """
    _warn_of_left_out(checkpoint, target)
    for caution in _core.cautions(checkpoint, target):
        warnings.warn(f"libqat: {caution.tensor} ({caution.grid}): {caution.reason}", stacklevel=2)
    source = checkpoint.tokenizer if tokenizer_from is None or tokenizer_from == "" else tokenizer_from
    with tempfile.TemporaryDirectory() as folder:
        if target != "gguf" and _is_gguf(source):
            write_tokenizer_files(Path(source), Path(folder))
            source = folder
        _core.export_checkpoint(
            checkpoint,
            path,
            target=target,
            tokenizer_from=source,
            name=name,
            progress=progress,
            dtype=dtype or "",
            max_shard_bytes=0 if max_shard_size is None else _bytes(max_shard_size),
            require_exact=require_exact,
            overwrite=overwrite,
        )


def _warn_of_left_out(checkpoint: QuantizedCheckpoint, target: str) -> None:
    scales = _core.left_out(checkpoint, target)
    if scales:
        more = f" and {len(scales) - 1} more" if len(scales) > 1 else ""
        warnings.warn(
            f"libqat: target {target} has no place for static activation scales: {scales[0]}{more} left out; "
            "its consumer treats activations in its own way",
            stacklevel=3,
        )


def _is_gguf(source: str | os.PathLike) -> bool:
    if not Path(source).is_file():
        return False
    with Path(source).open("rb") as file:
        return file.read(4) == b"GGUF"


def _bytes(size: int | str) -> int:
    """5, "5", "5GB" (powers of ten) or "5GiB" (powers of two) in bytes."""
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if unit is None or int(found[1]) == 0:
        raise ArgumentError(f"export: max_shard_size: expected bytes, or a size like 5GB, got {size!r}")
    return int(found[1]) * unit
