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


def blocks_on(grid: str, table: str = "q8_0") -> dict:
    """All matrices of the blocks on one grid, and the tied embedding on another."""
    return {"rules": [{"match": BLOCKS, "weight": grid}, {"match": TABLE, "weight": table}]}


def mixed() -> dict:
    """2 and 4 bits by hand, at most 3.2 bits per weight of the blocks.

    In GGUF's own q2_0 and q4_0: attention and the first and last blocks' MLPs keep 4 bits, the matrices that
    write into the residual stream rather than those that gate it.
    """
    return {
        "rules": [
            {"match": r"model\.layers\.\d+\.self_attn\..*_proj", "weight": "q4_0"},
            {"match": r"model\.layers\.([0-3]|29)\.mlp\..*_proj", "weight": "q4_0"},
            {"match": r"model\.layers\.\d+\.mlp\..*_proj", "weight": "q2_0"},
            {"match": TABLE, "weight": "q8_0"},
        ]
    }


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
    quick: bool = False
    """Part of `make quality-quick`, with the first seed."""


CASES = (
    Case("q4_0", "Q4_0, all block matrices", "q4_0", blocks_on("q4_0"), quick=True),
    Case("q2_0", "`q2_0`, all block matrices", "q2_0", blocks_on("q2_0"), quick=True),
    Case("q4_0-tied", "Q4_0, the tied embedding too", "q4_0", blocks_on("q4_0", "q4_0")),
    Case("int3_g64", "3 bits in groups of 64", "mlx3_g64", blocks_on("mlx3_g64", "mlx8_g64")),
    Case("mixed", "2/4 bits by hand", "q2_0+q4_0", mixed()),
    Case("q4_0-256k", "Q4_0, 256k tokens", "q4_0", blocks_on("q4_0"), 500, (0,)),
    Case("q2_0-256k", "`q2_0`, 256k tokens", "q2_0", blocks_on("q2_0"), 500, (0,)),
)
