"""Text that a model writes itself, for what has to know the model beyond one text: the starts of a run.

A method that rounds by calibration text fits that text's noise as well, and knows nothing of others. Samples
from the float model's own distribution cost no data and cover what it was trained on (LLM-QAT, Liu et al.
2023, arXiv:2305.17888, section 3.1).
"""

import json
import os
from collections.abc import Callable, Sequence

import torch

from . import _core
from ._core import ArgumentError, Decoder, FileError, NumericError, UnsupportedError
from .tokenizer import beginning_of_text, load_tokenizer

__all__ = ["first_tokens", "generate", "mixed", "of_model"]

_SEQUENCES = 200
"""At most at a time: the weights are read once for all of them, at each token."""
_CACHE = 1 << 30
"""Bytes of keys and values that they may take together."""


@torch.no_grad()
def generate(
    decoder: Decoder,
    count: int,
    window: int,
    first: torch.Tensor,
    *,
    beginning: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> torch.Tensor:
    """`count` texts that the decoder writes, each a sample at temperature 1: int64 [count, window].

    first: int64 [n], ids of which each text's first token is drawn evenly, so that the texts are not all of
    the likeliest kind. beginning: a token that stands before it, see `libqat.beginning_of_text`. The same
    seed gives the same text where the logits are the same bits. It computes in autocast's dtype or the
    decoder's own. progress: called with (tokens, of tokens, "writing text").

    ArgumentError unless count and window are positive and there are ids in `first`; NumericError for logits
    that are not finite.
    """
    if count < 1 or window < 1 or first.numel() == 0:
        got = f"{count} texts of {window} tokens that begin with one of {first.numel()}"
        raise ArgumentError(f"generate: expected at least one text, token and id to begin with, got {got}")
    generator = torch.Generator().manual_seed(seed)
    texts = torch.empty(count, window, dtype=torch.long)
    texts[:, 0] = first[torch.randint(len(first), (count,), generator=generator)]
    if beginning is not None:
        texts[:, 1:2] = texts[:, :1]
        texts[:, 0] = beginning
    given = 1 if beginning is None else 2
    size, done = _at_once(decoder, window), 0
    for part in texts.split(size):
        cache, prompt = decoder.new_cache(), part[:, :given]
        for at in range(given, window):
            part[:, at] = _drawn(decoder(prompt, cache)[:, -1], generator)
            prompt = part[:, at : at + 1]
            if progress is not None:
                progress(done + len(part) * (at + 1), texts.numel(), "writing text")
        done += part.numel()
    return texts


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An id for each row [n, V] with its probability, int64 [n].

    One random number a row, where torch.multinomial draws one for each id.
    """
    sums = logits.double().softmax(-1).cumsum(-1)
    if not sums[:, -1].isfinite().all():
        raise NumericError("generate: logits: expected finite ones, got others")
    at = torch.rand(len(sums), 1, dtype=torch.double, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)


def _at_once(decoder: Decoder, window: int) -> int:
    """Texts whose keys and values fit in _CACHE."""
    cache = decoder.new_cache()
    decoder(torch.zeros(1, 1, dtype=torch.long), cache)
    return max(1, min(_SEQUENCES, _CACHE // max(1, cache.nbytes * window)))


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


def mixed(parts: Sequence[torch.Tensor], seed: int = 0) -> torch.Tensor:
    """Windows of several sources in one order without a pattern, so that each batch has some of all.

    A single source stays as it is.
    """
    if len(parts) == 1:
        return parts[0]
    windows = torch.cat(list(parts))
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


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
