"""Where the weights of a tensor lie between the levels of its grid.

Everything is measured in code units through the grid's own `decode`: a weight that equals the level of code c
lies at c, whatever the scale, its sign or an offset. So one axis serves all blocks of a tensor and all grids.
The numbers of 4-bit floats say nothing about their order: there the unit is half the scale, as in ggml, and
the levels lie at 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _core, ops
from .tensors import TensorRow, Weight, chunks

_BINS = 192
"""Of a histogram, about."""
_LEAST_PER_BIN = 40
"""Weights of a bin on average; fewer would show noise. A small tensor gets wider bins."""


@dataclass(frozen=True)
class OnGrid:
    """Histograms of one tensor in code units; shares of its weights."""

    row: TensorRow
    codes: tuple[int, ...]
    """The legal codes."""
    levels: tuple[float, ...]
    """Where each code's level lies: its own number, on grids whose levels are evenly spaced."""
    edges: tuple[float, ...]
    """Borders of the bins, one more than bins. Weights outside are counted in the outermost bins."""
    original: tuple[float, ...]
    """The float weights, by the scales that rounding to nearest chooses for them."""
    latent: tuple[float, ...]
    """The trained latents, by the scales that ship."""


@torch.no_grad()
def on_grid(weight: Weight, row: TensorRow) -> OnGrid:
    """The histograms of one tensor on a grid with codes."""
    axis = _axis(weight.grid)
    low, high = axis.low, axis.high
    wanted = min(_BINS, row.weights // _LEAST_PER_BIN)
    per_level = max(int(wanted // (high - low + 1)), 1) | 1  # odd: each level lies in the middle of a bin
    bins = per_level * int(high - low + 2) + 1
    first, last = low - 1 - 0.5 / per_level, high + 1 + 0.5 / per_level
    totals = torch.zeros(2, bins, dtype=torch.float64)
    levels = None
    for original, latent, codes, scales in chunks(weight):
        _, ptq_scales = ops.quantize(original, weight.grid, tensor=weight.name)
        for total, tensor, scale in zip(totals, (original, latent), (ptq_scales, scales), strict=True):
            place = _in_codes(tensor, scale, axis).clamp_(low - 1, high + 1)
            total += torch.histc(place, bins, first, last).double()
        if levels is None:
            levels = _levels(scales[:1], codes.shape[1], axis)
    shares = totals / totals.sum(1, keepdim=True).clamp(min=1)
    return OnGrid(
        row=row,
        codes=tuple(axis.codes),
        levels=tuple(levels.tolist()),
        edges=tuple(torch.linspace(first, last, bins + 1, dtype=torch.float64).tolist()),
        original=tuple(shares[0].tolist()),
        latent=tuple(shares[1].tolist()),
    )


@dataclass(frozen=True)
class _Axis:
    """Where the levels of a grid lie, in code units."""

    grid: str
    codes: range
    units: tuple[float, ...]
    """The place of each code's level."""

    @property
    def low(self) -> float:
        return min(self.units)

    @property
    def high(self) -> float:
        return max(self.units)

    @property
    def lowest(self) -> int:
        """The code of the lowest place."""
        return self.codes[self.units.index(self.low)]

    @property
    def highest(self) -> int:
        return self.codes[self.units.index(self.high)]


def _axis(grid: str) -> _Axis:
    info = _core.grid_info(grid)
    codes = range(info["code_min"], info["code_max"] + 1)
    if not info["fields"][0][2].startswith("float8"):
        return _Axis(grid, codes, tuple(map(float, codes)))
    values = [_constant(code, torch.ones(1, 1, 1), (1, info["block"]), grid)[0, 0].item() for code in codes]
    return _Axis(grid, codes, tuple(2 * value for value in values))


def _constant(code: int, scales: Tensor, shape: tuple[int, ...], grid: str) -> Tensor:
    """What each place of the rows would be if it had this code: float32 of that shape, [r, N]."""
    codes = torch.full(shape, code, dtype=torch.int8)
    return ops.dequantize(codes, scales, grid)


def _in_codes(weights: Tensor, scales: Tensor, axis: _Axis) -> Tensor:
    """The weights in code units, flat, without blocks of scale zero, which have but one level."""
    least = _constant(axis.lowest, scales, weights.shape, axis.grid)
    span = _constant(axis.highest, scales, weights.shape, axis.grid).sub_(least)
    alive = span != 0
    return (weights - least)[alive] / span[alive] * (axis.high - axis.low) + axis.low


def _levels(scales: Tensor, width: int, axis: _Axis) -> Tensor:
    """The place of each code's level, by the first block of the row whose scale is not zero."""
    values = torch.stack([_constant(code, scales, (1, width), axis.grid)[0] for code in axis.codes])
    least, greatest = (values[axis.codes.index(code)] for code in (axis.lowest, axis.highest))
    alive = (greatest != least).nonzero()
    if not len(alive):
        return torch.tensor(axis.units)
    first = alive[0, 0]
    span = greatest[first] - least[first]
    return (values[:, first] - least[first]) / span * (axis.high - axis.low) + axis.low
