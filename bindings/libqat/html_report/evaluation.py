"""evaluation.json of a run folder: the scores that `libqat eval RUN` wrote, as plain objects."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .reading import Reader

TEXT_FIELDS = ("ppl", "nll", "kl", "top1")
CHOICE_FIELDS = ("accuracy", "accuracy_norm", "agreement")
"""accuracy_norm divides by the length of the choice; evaluations without it are read too."""
ROWS = {"float": "Float", "ptq": "PTQ", "qat": "QAT"}
"""Rows that every evaluation has, and what the report calls them."""


@dataclass(frozen=True)
class Measured:
    """A figure with its 95 % interval; either is None where it does not exist."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Model:
    """A row's file."""

    row: str
    path: str
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Row:
    """One model's scores on one task: field -> figure."""

    row: str
    scores: dict[str, Measured]

    @property
    def label(self) -> str:
        """What tables call it: QAT for "qat", a user's own row as it is."""
        return ROWS.get(self.row, self.row)


@dataclass(frozen=True)
class Task:
    """A text, a set of multiple-choice questions or a metric of the user's, with one row per model."""

    name: str
    rows: list[Row]
    items: int | None = None
    """Predicted tokens, or questions."""
    window: int | None = None
    """Tokens that were predicted together (texts)."""
    kl_removed: Measured | None = None
    """Share of the KL that rounding costs and training won back (texts)."""
    nll_removed: Measured | None = None

    def has(self, field: str) -> bool:
        """Whether any model has this figure."""
        return any(row.scores[field].value is not None for row in self.rows)

    def row(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.row == name), None)


@dataclass(frozen=True)
class Evaluation:
    """All of it."""

    models: list[Model]
    texts: list[Task]
    choices: list[Task]
    metrics: list[Task]


def parse_evaluation(content: Any, source: str) -> Evaluation:
    """A document as `libqat.run_folder.read_evaluation` returns it, checked to the last figure.

    source: its file, for messages. FileError naming the JSON path.
    """
    root = Reader(content, source)
    return Evaluation(
        models=[
            Model(
                row=entry.text("row"),
                path=entry.text("path"),
                bytes=entry.whole("bytes"),
                bits_per_weight=entry.number("bits_per_weight"),
            )
            for entry in root.entries("models")
        ],
        texts=[_text(entry) for entry in root.entries("texts")],
        choices=[
            _task(entry, CHOICE_FIELDS, items=entry.whole("questions")) for entry in root.entries("choices")
        ],
        metrics=[_metric(entry) for entry in root.entries("metrics")],
    )


def _text(entry: Reader) -> Task:
    return _task(
        entry,
        TEXT_FIELDS,
        items=entry.whole("tokens"),
        window=entry.whole("window"),
        kl_removed=_measured(entry, "kl_removed", "kl_removed_interval"),
        nll_removed=_measured(entry, "nll_removed", "nll_removed_interval"),
    )


def _task(entry: Reader, fields: tuple[str, ...], **settings: Any) -> Task:
    def scores(row: Reader) -> dict[str, Measured]:
        return {field: _measured(row, field, f"{field}_interval") for field in fields}

    return Task(entry.text("name"), _rows(entry, scores), **settings)


def _metric(entry: Reader) -> Task:
    return Task(entry.text("name"), _rows(entry, lambda row: {"value": _measured(row, "value", "interval")}))


def _rows(entry: Reader, scores: Callable[[Reader], dict[str, Measured]]) -> list[Row]:
    return [Row(row.text("row"), scores(row)) for row in entry.entries("rows")]


def _measured(entry: Reader, value: str, interval: str) -> Measured:
    return Measured(entry.number_or_none(value), entry.pair_or_none(interval))
