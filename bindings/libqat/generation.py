"""Text that a model writes itself, for what has to know the model beyond one text: the starts of a run.

A method that rounds by calibration text fits that text's noise as well, and knows nothing of others. Samples
from the float model's own distribution cost no data and cover what it was trained on (LLM-QAT, Liu et al.
2023, arXiv:2305.17888, section 3.1).
"""

import json
import os
from collections.abc import Callable

import torch

from . import _core
from ._core import Decoder, FileError, UnsupportedError, generate, mixed
from .tokenizer import beginning_of_text, load_tokenizer

__all__ = ["first_tokens", "generate", "mixed", "of_model"]


def first_tokens(source: str | os.PathLike, vocabulary: int) -> tuple[torch.Tensor, int | None]:
    """Ids that a text may begin with, and the token that stands before every text, of a model's tokenizer.

    Everything but special and added tokens, int64 [n]; without a tokenizer that libqat reads, all ids.
    """
    try:
        tokenizer, beginning = load_tokenizer(source), beginning_of_text(source)
    except (FileError, UnsupportedError):
        return torch.arange(vocabulary), None
    added = tokenizer.get_added_tokens_decoder().keys()
    plain = [i for i in range(min(vocabulary, tokenizer.get_vocab_size())) if i not in added]
    return torch.tensor(plain or list(range(vocabulary))), beginning


def of_model(
    loaded: _core.LoadedModel,
    source: str | os.PathLike,
    text: torch.Tensor,
    share: float,
    writer: Decoder,
    *,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> torch.Tensor:
    """Windows by the float model `writer`, a copy of the loaded one: see `libqat.teacher.float_copy`.

    text: int64 [n, T] windows that they are meant for: as many are written as make up `share` of both.
    source: where the model came from, for its tokenizer.
    """
    count = max(1, round(len(text) * share / (1 - share)))
    first, beginning = first_tokens(source, json.loads(loaded.config)["vocab_size"])
    return generate(writer, count, text.shape[1], first, beginning=beginning, seed=seed, progress=progress)
