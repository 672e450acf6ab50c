"""A teacher's answers on disk: built when they are missing, and held against the live teacher."""

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


def cache_path(teacher_cache: "str | os.PathLike | bool", folder: "str | os.PathLike") -> Path:
    """Where the cache is: True and "auto" mean `teacher.cache` in the run folder."""
    return Path(folder) / FILE if teacher_cache is True or teacher_cache == "auto" else Path(teacher_cache)


def live_teacher(loaded: LoadedModel, options: Mapping[str, Any]) -> _core.Decoder:
    """The float model, in the dtype in which it will compute."""
    return loaded.decoder.frozen_copy(getattr(torch, _core.compute_dtype(options["compute_dtype"])))


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
    teacher = live_teacher(loaded, options)

    def report(now: CacheProgress) -> None:
        if progress:
            progress(now)

    TeacherCache.build(path, plan, teacher, data, report, **options)
    cache = TeacherCache.open(path, plan)
    return cache, cache.check(prepared, teacher, data, **options)
