"""A run's teacher: live, sharing tables with the student where it can; or its answers on disk.

Those are built when they are missing, and held against the live teacher.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import _core
from ._core import CacheCheck, CachePlan, CacheProgress, LoadedModel, PreparedDecoder, TeacherCache, TokenData

FILE = "teacher.cache"
"""Name of the cache in a run folder, when no other path is given."""
TOP_K = 64
"""Tokens per position that are kept by default."""
WIDE_TABLE = "model.embed_tokens_per_layer.weight"
"""Looked up and never multiplied: a teacher may hold it in a wider dtype than it computes in."""
_ROWS = 1 << 14
"""Of a table that are compared at a time."""


def cache_path(teacher_cache: "str | os.PathLike | bool", folder: "str | os.PathLike") -> Path:
    """Where the cache is: True and "auto" mean `teacher.cache` in the run folder."""
    return Path(folder) / FILE if teacher_cache is True or teacher_cache == "auto" else Path(teacher_cache)


def float_copy(loaded: LoadedModel, compute_dtype: str = "auto") -> _core.Decoder:
    """A model that is not prepared yet, once more, in the dtype in which it will compute."""
    return loaded.decoder.frozen_copy(getattr(torch, _core.compute_dtype(compute_dtype)))


def share_frozen(teacher: _core.Decoder, student: _core.Decoder) -> list[str]:
    """Lets the teacher read the student's own parameters where those stay what the teacher has; their names.

    student: with a `Trainer`, which has decided what trains, and before its first step. A parameter is shared
    if it is frozen, has the teacher's numbers (rounded to the teacher's dtype), and has that dtype, or is the
    table of the layers' own inputs: then its rows are no longer rounded. Whoever writes into a parameter that
    is shared changes both models.
    """
    shared = []
    ours = student.parameters()
    for name, theirs in teacher.parameters().items():
        kept = ours[name].detach()
        fits = kept.dtype == theirs.dtype or name == WIDE_TABLE
        if fits and not ours[name].requires_grad and _same_numbers(kept, theirs):
            theirs.data = kept
            shared.append(name)
    return shared


def _same_numbers(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """A few rows at a time: tables are large."""
    parts = zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True)
    return all(torch.equal(one.to(two.dtype), two) for one, two in parts)


def cached_teacher(
    path: Path,
    loaded: LoadedModel,
    prepared: PreparedDecoder,
    data: TokenData,
    top_k: int,
    options: Mapping[str, Any],
    progress: Callable[[CacheProgress], Any] | None = None,
) -> tuple[TeacherCache, CacheCheck | None]:
    """The cache for a run of these options, complete; and, if anything had to be computed, how it compares.

    `prepared` must have the weights of `loaded`. An interrupted build goes on where it stopped. FileError for
    a file that belongs to another model, text, window length, k or temperature.
    """
    note = f"{loaded.config}\n{_core.compute_dtype(options['compute_dtype'])}"
    plan = CachePlan(data, top_k, _core.fingerprint(loaded.decoder, note), **options)
    if TeacherCache.missing(path, plan) == 0:
        return TeacherCache.open(path, plan), None
    teacher = float_copy(loaded, options["compute_dtype"])

    def report(now: CacheProgress) -> None:
        if progress:
            progress(now)

    TeacherCache.build(path, plan, teacher, data, report, **options)
    cache = TeacherCache.open(path, plan)
    return cache, cache.check(prepared, teacher, data, **options)
