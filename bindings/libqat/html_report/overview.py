"""Tables made of the tensors' table: error by depth and role, and bytes by grid and kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .tensors import KINDS, TensorRow

_LEAST_LAYERS = 2
_MOST_ROLES = 12
MEASURES = {
    "ptq_error": "PTQ error",
    "qat_error": "QAT error",
    "flip_rate": "Codes changed",
}
_SHARED_SCALE = ("ptq_error", "qat_error")
"""Measures that are coloured alike, so that they can be compared."""


@dataclass(frozen=True)
class Cell:
    """A value of the heat map and its strength, 0 to 100."""

    value: float
    heat: int


@dataclass(frozen=True)
class HeatMap:
    """One measure of the quantized tensors: layers down, roles across."""

    title: str
    roles: list[tuple[str, str]]
    """(short, full)"""
    lines: list[tuple[int, list[Cell | None]]]
    low: float
    high: float


def heat_maps(rows: Sequence[TensorRow]) -> list[HeatMap]:
    """The three maps; [] when the names show no layers, or too many different roles to fit."""
    placed: dict[tuple[int, str], list[TensorRow]] = {}
    for row in rows:
        if row.layer is not None and row.flip_rate is not None:
            placed.setdefault((row.layer, row.role), []).append(row)
    layers = sorted({layer for layer, _ in placed})
    roles = list(dict.fromkeys(role for _, role in placed))
    if len(layers) < _LEAST_LAYERS or len(roles) > _MOST_ROLES:
        return []
    values = {
        measure: {place: _mean(group, measure) for place, group in placed.items()} for measure in MEASURES
    }
    shared = [value for measure in _SHARED_SCALE for value in values[measure].values()]
    maps = []
    for measure, title in MEASURES.items():
        found = shared if measure in _SHARED_SCALE else list(values[measure].values())
        low, high = min(found), max(found)
        lines = [
            (layer, [_cell(values[measure].get((layer, role)), low, high) for role in roles])
            for layer in layers
        ]
        maps.append(HeatMap(title, list(zip(short_names(roles), roles, strict=True)), lines, low, high))
    return maps


def _mean(group: Sequence[TensorRow], measure: str) -> float:
    """By weights: a role that a layer has several times (experts) is one cell."""
    total = sum(row.weights for row in group)
    return sum(getattr(row, measure) * row.weights for row in group) / max(total, 1)


def _cell(value: float | None, low: float, high: float) -> Cell | None:
    if value is None:
        return None
    return Cell(value, round(100 * (value - low) / (high - low)) if high > low else 0)


def short_names(names: Sequence[str]) -> list[str]:
    """The fewest last parts that tell the names apart, without "_proj"."""
    parts = [name.removesuffix("_proj").split(".") for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        short = [".".join(name[-count:]) for name in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


@dataclass(frozen=True)
class Share:
    """Some of the model's tensors, summed."""

    label: str
    parts: str
    """The kinds that are on a grid, or the grids that a kind is on."""
    tensors: int
    trained: int
    weights: int
    bytes: int
    share: float
    """Of the model's bytes."""
    colour: int

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.bytes / max(self.weights, 1)


def by_grid(rows: Sequence[TensorRow]) -> list[Share]:
    """One line per grid, the largest first."""
    labels = list(dict.fromkeys(row.grid for row in rows))
    shares = _shares(rows, lambda row: row.grid, lambda row: row.kind, labels)
    return sorted(shares, key=lambda share: -share.bytes)


def by_kind(rows: Sequence[TensorRow]) -> list[Share]:
    """One line per kind of tensor that the model has."""
    return _shares(rows, lambda row: row.kind, lambda row: row.grid, list(KINDS))


def _shares(
    rows: Sequence[TensorRow],
    key: Callable[[TensorRow], str],
    part: Callable[[TensorRow], str],
    labels: Sequence[str],
) -> list[Share]:
    total = sum(row.bytes for row in rows)
    shares = []
    for colour, label in enumerate(labels, 1):
        some = [row for row in rows if key(row) == label]
        if not some:
            continue
        size = sum(row.bytes for row in some)
        shares.append(
            Share(
                label=label,
                parts=", ".join(dict.fromkeys(map(part, some))),
                tensors=len(some),
                trained=sum(row.trained for row in some),
                weights=sum(row.weights for row in some),
                bytes=size,
                share=size / max(total, 1),
                colour=colour,
            )
        )
    return shares
