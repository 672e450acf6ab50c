"""The rows of docs/quality.md: which model on which grid, from which tokens, by which settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BLOCKS = r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj"
TABLE = r"model\.embed_tokens"
METHODS = ("rtn", "search", "awq", "gptq", "guided")
"""PTQ, in the order in which the tables show them; the last is libqat's own."""
BASELINES = METHODS[:-1]
"""What training is compared with: the methods that others offer."""


def blocks_on(grid: str, table: str | None = "q8_0") -> dict:
    """All matrices of the blocks on one grid, and the tied embedding on another, or float."""
    tables = [{"match": TABLE, "weight": table}] if table else []
    return {"rules": [{"match": BLOCKS, "weight": grid}, *tables]}


def mixed() -> dict:
    """2 and 4 bits by hand, with scales 3.2 bits per weight of the blocks, in one compressed-tensors model.

    2 bits where a weight costs least by what guided rounding expects (docs/quality.md has the table): all
    queries; what writes into the residual stream but at its ends and where single channels are large (layers
    1 to 3 and 11); the MLP's inputs in the middle. Keys and values are small and cost most.
    """
    few = (
        r"\d+\.self_attn\.q_proj",
        r"(0|[4-9]|10|1[2-9]|2\d)\.self_attn\.o_proj",
        r"(1\d|2[0-6])\.mlp\.gate_proj",
        r"1[1-9]\.mlp\.up_proj",
        r"([5-9]|10|1[2-9]|20|21)\.mlp\.down_proj",
    )
    rules = [{"match": rf"model\.layers\.{match}", "weight": "int2_g64@fp16"} for match in few]
    return {"rules": [*rules, *blocks_on("int4_g64@fp16", None)["rules"]]}


@dataclass(frozen=True)
class Case:
    """One policy under every PTQ method and after QAT."""

    name: str
    title: str
    grid: str
    policy: dict
    steps: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    ptq: tuple[str, ...] = METHODS
    options: dict[str, Any] = field(default_factory=dict)
    """Of `libqat.finetune.start`; empty: what libqat recommends for these grids."""
    start_of: str = ""
    """The case whose start this one takes up with seed 0, made once: it has read the same windows."""
    quick: bool = False
    """Part of `make quality-quick`, with the first seed."""


CASES = (
    Case("q4_0", "Q4_0, all block matrices", "q4_0", blocks_on("q4_0"), start_of="q4_0", quick=True),
    Case("q2_0", "`q2_0`, all block matrices", "q2_0", blocks_on("q2_0"), start_of="q2_0", quick=True),
    Case("q4_0-tied", "Q4_0, the tied embedding too", "q4_0", blocks_on("q4_0", "q4_0")),
    Case("mlx3_g64", "3 bits in groups of 64", "mlx3_g64", blocks_on("mlx3_g64", "mlx8_g64")),
    Case("int3_g64", "3 bits, symmetric", "int3_g64@fp16", blocks_on("int3_g64@fp16", None)),
    Case("mixed", "2/4 bits by hand", "int2_g64@fp16+int4_g64@fp16", mixed()),
    Case("q4_0-256k", "Q4_0, 256k tokens", "q4_0", blocks_on("q4_0"), 500, (0,), start_of="q4_0"),
    Case("q2_0-256k", "`q2_0`, 256k tokens", "q2_0", blocks_on("q2_0"), 500, (0,), start_of="q2_0"),
)


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
