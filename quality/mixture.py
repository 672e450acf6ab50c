"""Why 2 and 4 bits together stay behind 3: what each matrix costs at each width, and the best mixtures.

Guided rounding expects of each matrix what its error adds to KL. Where rounding is mild these costs add up,
so the best mixture of any size can be found without making it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import plots
import tables
import torch
from cases import blocks_on
from libqat.cli import console
from libqat.grids import grid as grid_of
from models import Maker, prepare
from texts import WINDOW

import libqat

TITLE = "2 and 4 bits against 3"
TOKENS = 12_800
"""Of the training text, that each width is rounded by."""
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 5
"""In a column of the table."""
LOW, UNIFORM, HIGH = GRIDS = ("int2_g64@fp16", "int3_g64@fp16", "int4_g64@fp16")
"""2, 3 and 4 bits with the same scales."""
Row = Mapping[str, Any]


def rows(maker: Maker, path: Path) -> list[dict]:
    """{"name", "grid", "weights", "bits", "kl"} of each matrix of the blocks on each grid, kept in `path`."""
    kept = json.loads(path.read_text()) if path.exists() else []
    windows = maker.training[:TOKENS].view(-1, WINDOW)
    known = None  # the backward pass, which the grids share
    for grid in GRIDS:
        if not any(row["grid"] == grid for row in kept):
            known, found = measured(maker.source, grid, windows, known)
            kept += found
            tables.write_json(path, kept)
    return kept


def measured(
    source: Path, grid: str, windows: torch.Tensor, known: libqat.Sensitivity | None = None
) -> tuple[libqat.Sensitivity, list[dict]]:
    """The rows of one grid everywhere. windows: int64 [n, T]; known: what they say of the float model."""
    loaded, prepared = prepare(source, blocks_on(grid, None), "learned")
    if known is None:
        with console.progress("how much each output counts") as update:
            known = libqat.sensitivity(prepared, windows, progress=update)
    with console.progress(f"{grid}: what each matrix costs") as update:
        found = libqat.guided(prepared, windows, sensitivity=known, progress=update)
    shapes = {name: weight.shape for name, weight in loaded.decoder.parameters().items()}
    return known, [
        {
            "name": one.name,
            "grid": grid,
            "weights": shapes[one.name].numel(),
            "bits": grid_of(grid).bits_per_weight(shapes[one.name][1]),
            "kl": one.expected_kl,
        }
        for one in found
        if one.expected_kl is not None
    ]


class Mixture(NamedTuple):
    """Some parts at few bits, the others at more."""

    bits: float
    """Per weight."""
    kl: float
    """The sum of what the parts cost by themselves."""


def cost(found: list[Row], grid_of: Callable[[str], str]) -> Mixture:
    """Of the model whose matrices are on the grids that `grid_of` gives their names."""
    chosen = [row for row in found if row["grid"] == grid_of(row["name"])]
    weights = sum(row["weights"] for row in chosen)
    bits = sum(row["weights"] * row["bits"] for row in chosen) / weights
    return Mixture(bits, sum(row["kl"] for row in chosen))


def best(found: list[Row]) -> list[Mixture]:
    """From all matrices at many bits to all at few: next is the one that costs least for a bit saved."""
    at = {(row["name"], row["grid"]): row for row in found}

    def loss(name: str) -> float:
        few, many = at[name, LOW], at[name, HIGH]
        return (few["kl"] - many["kl"]) / few["weights"]

    order = sorted({row["name"] for row in found}, key=loss)
    curve = []
    for count in range(len(order) + 1):
        few = set(order[:count])
        curve.append(cost(found, lambda name, few=few: LOW if name in few else HIGH))
    return curve


def within(mixtures: Iterable[Mixture], bits: float) -> Mixture:
    """The one with the least KL that takes no more bits."""
    return min((mixture for mixture in mixtures if mixture.bits <= bits), key=lambda mixture: mixture.kl)


def section(found: list[Row], folder: Path) -> str:
    """The Markdown; the curve goes to `folder`."""
    curve, uniform = best(found), cost(found, lambda name: UNIFORM)
    text = f"## {TITLE}\n\n" + EXPLAINED.format(
        tokens=TOKENS,
        matrices=len(curve) - 1,
        uniform=uniform,
        same=within(curve, uniform.bits),
        equal=next(mixture for mixture in reversed(curve) if mixture.kl <= uniform.kl),
        low=curve[-1],
        high=curve[0],
    )
    return text + shares(found) + "\n" + plots.curve(curve, uniform, folder / "mixture.svg")


def shares(found: list[Row]) -> str:
    """What a weight of each kind costs at few bits, in means of all weights: a table of kinds and layers."""
    few = [row for row in found if row["grid"] == LOW]
    mean = sum(row["kl"] for row in few) / sum(row["weights"] for row in few)
    layer = {row["name"]: int(row["name"].split(".")[2]) for row in few}
    firsts = range(0, max(layer.values()) + 1, LAYERS)
    lines = []
    for kind in KINDS:
        cells = []
        for first in firsts:
            here = [
                row
                for row in few
                if f".{kind}." in row["name"] and layer[row["name"]] // LAYERS * LAYERS == first
            ]
            each = sum(row["kl"] for row in here) / sum(row["weights"] for row in here)
            cells.append(f"{each / mean:.2f}")
        lines.append([f"`{kind}`", *cells])
    return tables.table(
        [f"at `{LOW}`, layers", *(f">{first} – {first + LAYERS - 1}" for first in firsts)], lines
    )


EXPLAINED = """What would the best choice of 2-bit and 4-bit matrices give? Guided rounding expects of each
of the {matrices} matrices what its error [adds to KL](ptq.md#what-each-layer-costs), on {tokens:,} tokens
of the training text. Added up, 4 bits everywhere cost {high.kl:.3f} nats, 3 bits {uniform.kl:.3f} and 2 bits
{low.kl:.3f}, all in groups of 64 with fp16 scales. With matrices put at 2 bits in the order of what they
cost for each bit saved, the best mixture of at most {uniform.bits:.2f} bits per weight costs {same.kl:.3f};
to cost as little as 3 bits everywhere, a mixture needs {equal.bits:.2f} bits.

One bit less makes the squared error four times larger, so half of the weights at 2 bits and half at 4 have
(16 + 1) / 2 = 8.5 times the error of 4 bits where 3 bits have 4 times: the half at 2 bits has to matter four
times less than the other. What is expected is a lower bound, and the lower the larger single errors are:
beside the rows `guided` of the two cases above, the mixture falls further short of it than 3 bits do. How
much weights of each kind cost at 2 bits, in means of all:

"""
