"""What the models are trained and judged on: articles of Wikipedia, and text of another domain."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

import libqat
from libqat import data

WINDOW = 256
BATCH = 2
STEP = BATCH * WINDOW
"""Tokens of an optimizer step."""
MARKUP = 0.3
"""Share of the training windows that show raw wikitext instead of prose, as in the quickstart."""
TITLES = {"wiki": "held-out Wikipedia", "other": "Python reference"}


class Texts(NamedTuple):
    """Token ids, int64[n]."""

    training: torch.Tensor
    judged: dict[str, torch.Tensor]
    """"wiki" and "other": windows spread evenly over texts that no training window comes from."""


def read(source: Path, eval_tokens: int) -> Texts:
    """The training stream, and `eval_tokens` of each judged text."""
    tokenizer = libqat.load_tokenizer(source)
    training, held_out = data.wikipedia_articles()
    prose = data.tokenize(tokenizer, [article.text for article in training])
    windows = prose[: len(prose) // WINDOW * WINDOW]
    markup = data.tokenize(tokenizer, [article.markup for article in training])
    share = round(len(windows) // WINDOW * MARKUP / (1 - MARKUP)) * WINDOW
    judged = {"wiki": [article.text for article in held_out], "other": data.python_topics()}
    return Texts(
        torch.cat([windows, data.spread_windows(markup, share, WINDOW)]),
        {
            name: data.spread_windows(data.tokenize(tokenizer, text), eval_tokens, WINDOW)
            for name, text in judged.items()
        },
    )
