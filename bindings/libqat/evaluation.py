"""Models side by side on your own task: text, multiple choice and metrics of your own, with intervals.

Each function takes models by row name, the float model first, and returns an entry of evaluation.json: a dict
of plain numbers. Intervals are 95 % paired bootstrap percentile intervals: all models see the same resampled
windows, questions or items. A figure that is not finite, or an interval that does not exist, is None.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from . import _core
from ._core import ArgumentError, Score
from .choices import Question, encode_questions, question_of

FLOAT, PTQ, QAT = "float", "ptq", "qat"
"""Rows of a run: the model as it was, rounded to nearest on the run's grids, and trained on them."""

Model = Any
"""A Decoder, a PreparedDecoder, or a function int64[B, T] -> logits [B, T, V]."""
Progress = Callable[[int, int], Any]
"""Called with what is done and with all there is; returning False stops."""

RESAMPLES = 10000


def compare_text(
    models: Mapping[str, Model],
    tokens: torch.Tensor,
    *,
    name: str = "text",
    window: int = 256,
    batch: int = 4,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity, and KL and top-1 agreement with the first model, on one text.

    models: row name -> Model; the first is the reference. tokens: int64[n], cut into windows of `window`.
    progress: in predicted tokens.

    Returns {"name", "tokens", "window", "resamples", "rows": [{"row", "ppl", "nll", "kl", "top1" and
    "..._interval" of each}]}, and with rows "ptq" and "qat" the shares "kl_removed", "nll_removed" of what
    rounding cost, with their intervals. ArgumentError as `libqat.compare`.
    """
    rows = _rows(models)
    scores = _core.compare(
        models[rows[0]],
        [models[row] for row in rows[1:]],
        tokens,
        window=window,
        batch=batch,
        progress=progress,
    )
    options = {"resamples": resamples, "seed": seed}
    intervals = _core.score_intervals(scores, **options)
    entry = {
        "name": name,
        "tokens": scores[0].tokens,
        "window": window,
        "resamples": resamples,
        "rows": [
            {"row": row, **_figures(score), **{f"{key}_interval": _pair(pair) for key, pair in found.items()}}
            for row, score, found in zip(rows, scores, intervals, strict=True)
        ],
    }
    by_row = dict(zip(rows, scores, strict=True))
    if PTQ in by_row and QAT in by_row:
        shares = _core.removed(scores[0], by_row[PTQ], by_row[QAT], **options)
        for key in ("kl", "nll"):
            entry[f"{key}_removed"] = _number(shares[key])
            entry[f"{key}_removed_interval"] = _pair(shares[f"{key}_interval"])
    return entry


def _figures(score: Score) -> dict[str, float | None]:
    figures = {"ppl": score.perplexity, "nll": score.nll, "kl": score.kl, "top1": score.top1}
    return {key: _number(value) for key, value in figures.items()}


def compare_choices(
    models: Mapping[str, Model],
    questions: "Sequence[Question | Mapping[str, Any]]",
    tokenizer: Any,
    *,
    name: str = "choices",
    max_length: int = 2048,
    batch_tokens: int = 1024,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
    beginning: int | None = None,
) -> dict[str, Any]:
    """Multiple choice by log-likelihood: the choice whose tokens are the most probable after the question.

    models: row name -> Model; the first is the reference. questions: `read_choices(path)`, or dicts with the
    keys of such a file's lines. tokenizer: see `load_tokenizer`. max_length: longest input in tokens; longer
    questions lose their beginning. batch_tokens: tokens of a forward pass. progress: in scored choices, over
    all models. beginning: token put before each question, see `libqat.beginning_of_text`.

    Returns {"name", "questions", "rows": [{"row", "accuracy", "accuracy_norm", "agreement", each with its
    "..._interval"}]}. accuracy: share of right choices (lm-evaluation-harness: acc). accuracy_norm: after
    division by the choice's bytes (acc_bytes there; acc_norm divides by characters, the same for ASCII).
    agreement: share of questions where the model chooses what the first one chooses. Rows after the first
    also have "difference" in accuracy to the first and "difference_interval".
    """
    rows = _rows(models)
    asked = encode_questions(
        tokenizer,
        [q if isinstance(q, Question) else question_of(q, f"{name}[{i}]") for i, q in enumerate(questions)],
        beginning,
        max_length,
    )
    total = len(rows) * sum(len(choices) for choices, _, _ in asked)
    scores = []
    for index, row in enumerate(rows):
        before = index * total // len(rows)
        scores.append(
            _core.score_choices(
                models[row],
                asked,
                max_length=max_length,
                batch_tokens=batch_tokens,
                progress=progress and (lambda done, _, before=before: progress(before + done, total)),
            )
        )
    answers = [answer for _, _, answer in asked]
    options = (resamples, seed)
    entry = {"name": name, "questions": len(asked), "rows": []}
    right = [_matches(score.chosen, answers) for score in scores]
    for index, (row, score) in enumerate(zip(rows, scores, strict=True)):
        result = {"row": row}
        result |= _share("accuracy", right[index], *options)
        result |= _share("accuracy_norm", _matches(score.chosen_per_byte, answers), *options)
        result |= _share("agreement", _matches(score.chosen, scores[0].chosen), *options)
        if index > 0:
            result |= _difference(right[index], right[0], *options)
        entry["rows"].append(result)
    return entry


def _matches(chosen: Sequence[int], expected: Sequence[int]) -> list[float]:
    return [float(a == b) for a, b in zip(chosen, expected, strict=True)]


def _share(key: str, items: list[float], resamples: int, seed: int) -> dict[str, Any]:
    return {key: math.fsum(items) / len(items), f"{key}_interval": _interval(items, resamples, seed)}


def compare_metric(
    models: Mapping[str, Any],
    metric: Callable[[Any], "float | Sequence[float]"],
    *,
    name: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """A metric of your own on each model.

    models: row name -> anything that `metric` takes; torch modules are in evaluation mode while it runs, and
    no gradients are recorded. metric: returns a number, or one value per item (a sequence or a 1-D tensor;
    the same items in the same order for each model), which gives intervals of the mean.

    Returns {"name", "rows": [{"row", "value", "interval"}]}. With values per item, rows after the first also
    have "difference" (to the first row's value) and "difference_interval": where that interval excludes 0,
    the models differ beyond the chance of the items. ArgumentError when the metric returns something else.
    """
    rows = _rows(models)
    name = name or getattr(metric, "__name__", type(metric).__name__)
    found = {row: _measured(metric, models[row], f"compare_metric: {name}({row})") for row in rows}
    entry = {"name": name, "rows": []}
    for row in rows:
        value, items = found[row]
        result = {"row": row, "value": _number(value), "interval": None}
        if items is not None:
            result["interval"] = _interval(items, resamples, seed)
            if row != rows[0]:
                _check_items(items, found[rows[0]][1], f"compare_metric: {name}({row})")
                result |= _difference(items, found[rows[0]][1], resamples, seed)
        entry["rows"].append(result)
    return entry


def _measured(metric: Callable, model: Any, subject: str) -> tuple[float, list[float] | None]:
    """(value, items): the mean of the items where there are any."""
    with torch.no_grad(), _EvaluationMode(model):
        result = metric(model)
    try:
        if isinstance(result, (str, bytes, Mapping)):
            raise TypeError("no number")
        if isinstance(result, torch.Tensor):
            result = result.tolist()
        if not isinstance(result, Iterable):
            return float(result), None
        items = [float(item) for item in result]
    except (TypeError, ValueError) as error:
        got = f"{type(result).__name__} ({error})"
        raise ArgumentError(f"{subject}: expected a number or numbers per item, got {got}") from error
    if not items:
        raise ArgumentError(f"{subject}: expected at least one item, got none")
    return math.fsum(items) / len(items), items


class _EvaluationMode:
    """Switches torch modules to evaluation and puts each one's mode back."""

    def __init__(self, model: Any):
        module = getattr(model, "model", model)  # a libqat.PreparedModel holds its module
        modules = module.modules() if isinstance(module, torch.nn.Module) else ()
        self._training = [part for part in modules if part.training]

    def __enter__(self) -> None:
        for part in self._training:
            part.training = False

    def __exit__(self, *exception) -> None:
        for part in self._training:
            part.training = True


def _check_items(items: list[float], first: list[float] | None, subject: str) -> None:
    if first is None or len(first) != len(items):
        got = "a number" if first is None else f"{len(first)}"
        raise ArgumentError(
            f"{subject}: expected as many items for each model, got {len(items)} here and {got} for the first"
        )


def _difference(items: list[float], first: list[float], resamples: int, seed: int) -> dict[str, Any]:
    """Of the means, over the same items."""
    apart = [a - b for a, b in zip(items, first, strict=True)]
    return {
        "difference": _number(math.fsum(apart) / len(apart)),
        "difference_interval": _interval(apart, resamples, seed),
    }


def _rows(models: Mapping[str, Any]) -> list[str]:
    if not models:
        raise ArgumentError("libqat.evaluation: models: expected at least one, got none")
    return list(models)


def _interval(values: Sequence[float], resamples: int, seed: int) -> list[float | None] | None:
    return _pair(_core.mean_interval(list(values), resamples=resamples, seed=seed))


def _pair(interval: tuple[float, float]) -> list[float] | None:
    """[low, high], or None when an end is missing."""
    return list(interval) if all(map(math.isfinite, interval)) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
