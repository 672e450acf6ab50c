"""Sentences with human ratings, and what can be measured on their embeddings.

Legend: N sentences, T tokens, D the embedding's width.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from libqat import data

RIDGE = 1.0
"""Penalty of the regression on unit vectors, in units of one sentence; chosen on the float model."""
MAX_TOKENS = 128
"""Of a sentence; the longest here have about 80."""
READ_AT_ONCE = 64


class Rated(NamedTuple):
    """Sentences and their mean human rating, -4 to 4, float64[N]."""

    texts: list[str]
    ratings: Tensor


@dataclass(frozen=True)
class Texts:
    """Movie reviews and tweets teach; held-out movie reviews, editorials and product reviews judge."""

    training: list[str]
    """What the encoder is trained on. Its ratings are not used there."""
    regression: Rated
    """Movie reviews from the training text: the sentiment regression is fitted on them."""
    judged: dict[str, Rated]
    """"movies" (of the training's domain, none of its sentences), "nyt" and "amazon"."""


def read(judged: int, regression: int, seed: int, cache: str | os.PathLike | None = None) -> Texts:
    """Shuffles each text by `seed`; `judged` sentences of each are scored, `regression` fit the sentiment."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for name, sentences in data.rated_sentences(cache).items():
        order = torch.randperm(len(sentences), generator=generator).tolist()
        shuffled[name] = [sentences[i] for i in order]
    held_out = {name: _rated(shuffled[name][:judged]) for name in ("movies", "nyt", "amazon")}
    seen = set(held_out["movies"].texts)
    reviews = [sentence for sentence in shuffled["movies"][judged:] if sentence.text not in seen]
    training = [sentence.text for sentence in reviews + shuffled["tweets"]]
    return Texts(training, _rated(reviews[:regression]), held_out)


def _rated(sentences: list[data.RatedSentence]) -> Rated:
    ratings = torch.tensor([sentence.rating for sentence in sentences], dtype=torch.float64)
    return Rated([sentence.text for sentence in sentences], ratings)


def tokenized(tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """input_ids, attention_mask and token_type_ids, int64[N, T], padded to the longest."""
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """[N, D]: the mean of a sentence's token vectors [N, T, D], of length 1, as the model is made for."""
    real = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, tokenizer, texts: list[str]) -> Tensor:
    """float32[N, D]: the sentences' embeddings, in their order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    parts = []
    for start in range(0, len(texts), READ_AT_ONCE):
        batch = tokenized(tokenizer, [texts[i] for i in order[start : start + READ_AT_ONCE]])
        parts.append(pooled(model(**batch).last_hidden_state, batch["attention_mask"]))
    embeddings = torch.cat(parts)
    return torch.empty_like(embeddings).index_copy_(0, torch.tensor(order), embeddings)


class Regression:
    """Rating = embedding * weights + offset, by ridge regression."""

    def __init__(self, embeddings: Tensor, ratings: Tensor):
        x = embeddings.double()
        self.mean, self.offset = x.mean(0), ratings.mean()
        x = x - self.mean
        penalty = RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        self.weights = torch.linalg.solve(x.T @ x + penalty, x.T @ (ratings - self.offset))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """float64[N]: predicted ratings."""
        return (embeddings.double() - self.mean) @ self.weights + self.offset


def rank_products(predicted: Tensor, ratings: Tensor) -> Tensor:
    """float64[N] whose mean is Spearman's rank correlation: products of standardized ranks."""
    return _standard_ranks(predicted) * _standard_ranks(ratings)


def _standard_ranks(values: Tensor) -> Tensor:
    """Ranks of mean 0 and variance 1; equal values share the mean of their ranks."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1) / 2)[group]
    return (ranks - ranks.mean()) / ranks.std(correction=0)


def same_neighbour(embeddings: Tensor, reference: Tensor) -> Tensor:
    """float64[N]: 1 where a sentence's nearest other sentence is the one that `reference` finds."""
    return (_neighbours(embeddings) == _neighbours(reference)).double()


def _neighbours(embeddings: Tensor) -> Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)
