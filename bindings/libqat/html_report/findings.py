"""What an engineer would point at in a report: signs that a run went well, and signs that it did not.

The thresholds are those that docs/report.md explains.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from .data import ReportData
from .tensors import TensorRow

FEW_TOKENS = 8000
STILL_FALLING = 0.1
HARDLY_MOVED = 0.001
SPIKE = 10.0
EDGE_GROWTH = 1.5
FAR = 2.0
_SMALL_GRID = 16


@dataclass(frozen=True)
class Finding:
    """One remark. level: "good", "note" or "warning"; section: the anchor that shows more."""

    level: str
    text: str
    section: str


def findings(data: ReportData) -> list[Finding]:
    """Warnings first, then notes, then what is good."""
    checks: tuple[Callable[[ReportData], Iterator[Finding]], ...] = (
        _quality, _loss, _spikes, _movement, _edges, _dead, _distance,
    )  # fmt: skip
    found = [finding for check in checks for finding in check(data)]
    return sorted(found, key=lambda finding: ("warning", "note", "good").index(finding.level))


def _quality(data: ReportData) -> Iterator[Finding]:
    for text in data.evaluation.texts if data.evaluation else []:
        removed = text.kl_removed
        if removed is None or removed.value is None:
            continue
        low = removed.interval[0] if removed.interval else removed.value
        if removed.value <= 0:
            level, remark = "warning", "training won back nothing of what rounding costs."
        elif low <= 0:
            level, remark = "warning", "the interval of the KL removed includes 0; it may be noise."
        else:
            level, remark = "good", f"{removed.value:.0%} of the KL that rounding costs is won back."
        yield Finding(level, f"{text.name}: {remark}", "quality")
        if (text.items or 0) < FEW_TOKENS:
            remark = f"{text.items:,} tokens are few; {FEW_TOKENS:,} or more make the interval narrow."
            yield Finding("note", f"{text.name}: {remark}", "quality")


def _loss(data: ReportData) -> Iterator[Finding]:
    losses = [step["loss"] for step in data.steps if "loss" in step]
    quarter = len(losses) // 4
    if quarter < 5:
        return
    begins = (0, 2 * quarter, len(losses) - quarter)
    first, third, last = (sum(losses[begin : begin + quarter]) / quarter for begin in begins)
    if last >= first:
        yield Finding("warning", "The loss did not fall from its first quarter to its last.", "training")
    elif last < (1 - STILL_FALLING) * third:
        fall = (
            f"The loss still falls at the end, by {1 - last / third:.0%} from the third quarter to the last"
        )
        yield Finding("note", f"{fall}: more steps would help.", "training")


def _spikes(data: ReportData) -> Iterator[Finding]:
    norms = {step["step"]: step["gradient_norm"] for step in data.steps if "gradient_norm" in step}
    usual = median(norms.values()) if norms else 0
    spikes = [step for step, norm in norms.items() if norm > SPIKE * usual]
    if spikes:
        text = f"The gradient norm was more than {SPIKE:.0f} × its median in {len(spikes)} steps"
        yield Finding("warning", f"{text}, first in step {spikes[0]}.", "training")


def _trained(data: ReportData) -> list[TensorRow]:
    return [row for row in data.tensors if row.trained and row.flip_rate is not None]


def _movement(data: ReportData) -> Iterator[Finding]:
    rows = _trained(data)
    total = sum(row.weights for row in rows)
    flipped = sum(row.flip_rate * row.weights for row in rows) / total if total else 1
    # Guided starts leave other codes than rounding to nearest; what the steps flipped on the way bounds what
    # training changed.
    steps = [step["flip_rate"] for step in data.steps if "flip_rate" in step]
    flipped = min(flipped, sum(steps)) if steps else flipped
    if flipped < HARDLY_MOVED:
        text = f"Training changed only {flipped:.2%} of the codes"
        yield Finding("warning", f"{text}: a higher learning rate or more steps are needed.", "layers")


def _edges(data: ReportData) -> Iterator[Finding]:
    grown = []
    for row in _trained(data):
        before = (row.ptq_counts[0] + row.ptq_counts[-1]) / max(row.weights, 1)
        if row.edge_share > EDGE_GROWTH * before and row.edge_share - before > 0.01:
            grown.append(row)
    yield from _about(
        grown, "a much larger share of codes at the ends of the grid than after rounding", "warning"
    )


def _dead(data: ReportData) -> Iterator[Finding]:
    lost = [
        row
        for row in _trained(data)
        if len(row.qat_counts) <= _SMALL_GRID and row.dead_codes > row.ptq_counts.count(0)
    ]
    yield from _about(lost, "codes that training left without a weight", "warning")


def _distance(data: ReportData) -> Iterator[Finding]:
    far = [row for row in _trained(data) if row.qat_error > FAR * row.ptq_error]
    yield from _about(
        far, f"more than {FAR:.0f} × the error of rounding: training moved far from the float model", "note"
    )


def _about(rows: list[TensorRow], what: str, level: str) -> Iterator[Finding]:
    if rows:
        names = ", ".join(row.name for row in rows[:3]) + (", …" if len(rows) > 3 else "")
        count = "1 tensor has" if len(rows) == 1 else f"{len(rows)} tensors have"
        yield Finding(level, f"{count} {what}: {names}.", "tensors")
