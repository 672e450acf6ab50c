"""Why 2 and 4 bits together stay behind 3: what each part of the model costs at each width, by itself.

A part is the matrices of one kind in five layers. One part at a time takes the weights that GPTQ left it
with, all else stays float; KL is measured on windows of the training text. Where rounding is mild these costs
add up, so the best mixture of any size can be found without making it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plots
import tables
import torch
from cases import CASES
from libqat.cli import console
from models import Maker
from scoring import GROUP
from texts import WINDOW

import libqat

TITLE = "2 and 4 bits against 3"
TOKENS = 2048
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 5
"""Of a part."""
WIDTHS = {"q2_0": "q2_0", "int3_g64": "mlx3_g64", "q4_0": "q4_0"}
"""Case -> its grid: 2, 3 and 4 bits."""
LOW, UNIFORM, HIGH = WIDTHS.values()
Row = Mapping[str, Any]


class Part(NamedTuple):
    """The matrices of one kind in some layers."""

    kind: str
    first: int
    names: tuple[str, ...]


def parts(names: Iterable[str]) -> list[Part]:
    """Of a model's parameters, kind by kind."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        pieces = name.split(".")
        kind = next((piece for piece in pieces if piece in KINDS), None)
        if kind:
            first = int(pieces[2]) // LAYERS * LAYERS
            found.setdefault((kind, first), []).append(name)
    order = sorted(found, key=lambda key: (KINDS.index(key[0]), key[1]))
    return [Part(kind, first, tuple(found[kind, first])) for kind, first in order]


def rows(maker: Maker, path: Path) -> list[dict]:
    """{"kind", "first", "grid", "weights", "bits", "kl"} of each part on each grid, kept in `path`."""
    kept = json.loads(path.read_text()) if path.exists() else []
    done = {(row["kind"], row["first"], row["grid"]) for row in kept}
    tokens = maker.training[:TOKENS]
    float_ = libqat.open_model(maker.source, "float").decoder
    for name, grid in WIDTHS.items():
        checkpoint = maker.rounded(next(case for case in CASES if case.name == name), "gptq")
        missing = [part for part in parts(float_.parameters()) if (*part[:2], grid) not in done]
        for start in range(0, len(missing), GROUP):
            kept += measured(float_, checkpoint, grid, missing[start : start + GROUP], tokens)
            tables.write_json(path, kept)
    return kept


def measured(
    float_: libqat.Decoder, checkpoint: Path, grid: str, some: Sequence[Part], tokens: torch.Tensor
) -> list[dict]:
    """The rows of some parts, one model for each, in one pass of the float model."""
    rounded = libqat.open_model(checkpoint).decoder.parameters()
    models = [float_.frozen_copy(torch.float32) for _ in some]
    for model, part in zip(models, some, strict=True):
        weights = model.parameters()
        for name in part.names:
            weights[name].copy_(rounded[name])
    with console.progress(f"{grid}: {some[0].kind} from layer {some[0].first}") as update:
        scores = libqat.compare(
            float_, models, tokens, window=WINDOW, progress=lambda done, total: update(done, total)
        )
    return [
        {
            "kind": part.kind,
            "first": part.first,
            "grid": grid,
            "weights": sum(rounded[name].numel() for name in part.names),
            "bits": libqat.grids.grid(grid).bits_per_weight(rounded[part.names[0]].shape[1]),
            "kl": score.kl,
        }
        for part, score in zip(some, scores[1:], strict=True)
    ]


class Mixture(NamedTuple):
    """Some parts at few bits, the others at more."""

    bits: float
    """Per weight."""
    kl: float
    """The sum of what the parts cost by themselves."""


def cost(found: list[Row], grid_of: Callable[[Row], str]) -> Mixture:
    """Of the model whose parts are on the grids that `grid_of` gives a row's part."""
    chosen = [row for row in found if row["grid"] == grid_of(row)]
    weights = sum(row["weights"] for row in chosen)
    bits = sum(row["weights"] * row["bits"] for row in chosen) / weights
    return Mixture(bits, sum(row["kl"] for row in chosen))


def best(found: list[Row]) -> list[Mixture]:
    """From all parts at many bits to all at few: next is always the part that costs least for a bit saved."""
    at = {(row["kind"], row["first"], row["grid"]): row for row in found}
    weights = {(row["kind"], row["first"]): row["weights"] for row in found}

    def loss(part: tuple[str, int]) -> float:
        return (at[(*part, LOW)]["kl"] - at[(*part, HIGH)]["kl"]) / weights[part]

    order = sorted(weights, key=loss)
    curve = []
    for count in range(len(order) + 1):
        few = set(order[:count])
        curve.append(cost(found, lambda row, few=few: LOW if (row["kind"], row["first"]) in few else HIGH))
    return curve


def within(mixtures: Iterable[Mixture], bits: float) -> Mixture:
    """The one with the least KL that takes no more bits."""
    return min((mixture for mixture in mixtures if mixture.bits <= bits), key=lambda mixture: mixture.kl)


def section(found: list[Row], folder: Path) -> str:
    """The Markdown; the curve goes to `folder`."""
    curve, uniform = best(found), cost(found, lambda row: UNIFORM)
    same = within(curve, uniform.bits)
    equal = next(mixture for mixture in reversed(curve) if mixture.kl <= uniform.kl)
    text = f"## {TITLE}\n\n" + EXPLAINED.format(
        tokens=TOKENS,
        layers=LAYERS,
        parts=len(curve) - 1,
        uniform=uniform,
        same=same,
        equal=equal,
        low=curve[-1],
        high=curve[0],
    )
    firsts = sorted({row["first"] for row in found})
    columns = ["KL at 2 bits, 1e-9 per weight", *(f">{first} – {first + LAYERS - 1}" for first in firsts)]
    cells = {
        (row["kind"], row["first"]): f"{1e9 * row['kl'] / row['weights']:.1f}"
        for row in found
        if row["grid"] == LOW
    }
    lines = [[f"`{kind}`", *(cells[kind, first] for first in firsts)] for kind in KINDS]
    text += tables.table(columns, lines) + "\n"
    return text + plots.curve(curve, uniform, folder / "mixture.svg")


EXPLAINED = """What would the best choice of 2-bit and 4-bit parts give? One part at a time ({parts} of them:
the matrices of one kind in {layers} layers) takes its GPTQ weights, all else stays float; KL on {tokens:,}
tokens of the training text. Added up, `q4_0` everywhere costs {high.kl:.3f}, `mlx3_g64` {uniform.kl:.3f} and
`q2_0` {low.kl:.3f}. With the parts put on `q2_0` in the order of what they cost for each bit saved, the best
mixture of at most {uniform.bits:.2f} bits per weight costs {same.kl:.3f}; to cost as little as 3 bits
everywhere, a mixture needs {equal.bits:.2f} bits.

One bit less makes the squared error four times larger, so half of the weights at 2 bits and half at 4 have
(16 + 1) / 2 = 8.5 times the error of 4 bits where 3 bits have 4 times: the half at 2 bits would have to
matter four times less than the other.

"""
