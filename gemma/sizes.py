"""What the published sizes take on disk by libqat's account, beside what was published."""

from __future__ import annotations

from typing import Any, NamedTuple

from libqat import sizes


class Case(NamedTuple):
    """A published model under a policy."""

    model: str
    policy: str | None
    """None: bfloat16."""
    format: str | None
    published: int | None = None
    """Bytes of the published file, or of its text without the per-layer table."""
    source: str = ""
    resident: bool = False
    """Count without the per-layer table, which a device reads by the row."""


GIB = 1 << 30
MODELS = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
PUBLISHED = {"gemma-4-e2b": 3_349_516_256, "gemma-4-e4b": 5_154_939_136}
GOOGLE = "Google's GGUF, with 16 MB of header and vocabulary"
CASES = (
    *(Case(model, None, None) for model in MODELS),
    *(
        Case(model, "gemma4-q4_0", "gguf", PUBLISHED.get(model), GOOGLE if model in PUBLISHED else "")
        for model in MODELS
    ),
    Case(
        "gemma-4-e2b",
        "gemma4-e2b-mobile",
        "gemma-mobile",
        round(0.84 * GIB),
        "0.84 GiB of text without the per-layer table",
        resident=True,
    ),
    Case("gemma-4-e4b", "gemma4-e4b-mobile", "gemma-mobile", resident=True),
)
TOLERANCE = 0.006
"""Of a published figure: two digits, or a header of 16 MB on 3.3 GB."""


def rows() -> list[dict[str, Any]]:
    """One row for each case."""
    return [_row(case) for case in CASES]


def _row(case: Case) -> dict[str, Any]:
    found = sizes.size(case.model, case.policy, format=case.format)
    counted = found.bytes_without_layer_embedding if case.resident else found.bytes
    return {
        "model": case.model,
        "policy": case.policy or "bf16",
        "format": case.format or "",
        "resident": case.resident,
        "bytes": counted,
        "bits_per_weight": found.bits_per_weight,
        "published_bytes": case.published,
        "published": case.source,
        "agrees": case.published is None or abs(counted / case.published - 1) < TOLERANCE,
    }
