"""How the report writes numbers and names."""

import re
from typing import Any

from .evaluation import Measured

_STYLES = {
    "percent0": "{:.0%}",
    "percent1": "{:.1%}",
    "percent2": "{:.2%}",
    "two": "{:.2f}",
    "four": "{:.4f}",
}


def figure(value: float | None, style: str) -> str:
    """A number in one of the styles; a dash where there is none."""
    return "–" if value is None else _STYLES[style].format(value)


def span(interval: tuple[float, float], style: str) -> str:
    """An interval: "0.12 to 0.15"."""
    return f"{figure(interval[0], style)} to {figure(interval[1], style)}"


def share_with_span(measured: Measured) -> str:
    """A share with its interval: "58% (57% to 59%)"."""
    text = figure(measured.value, "percent0")
    return f"{text} ({span(measured.interval, 'percent0')})" if measured.interval else text


def thousands(value: int | None) -> str:
    """1,234,567."""
    return "–" if value is None else f"{value:,}"


def megabytes(size: int) -> str:
    """In the unit that gives one to three digits before the point; powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def objective(weights: dict[str, float]) -> str:
    """In words: "KL to the float model", or the parts with their weights."""
    names = {
        "kl": "KL to the float model",
        "reverse_kl": "reverse KL",
        "jsd": "Jensen-Shannon divergence",
        "cakld": "CAKLD",
        "ce": "cross-entropy",
    }
    parts = [(weights.get(key, 0.0), name) for key, name in names.items() if weights.get(key, 0.0)]
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    return " + ".join(f"{weight:g} {name}" for weight, name in parts)


_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_LABEL = 24


def clean(text: str) -> str:
    """Without the characters that no HTML document may hold; a file name may have them."""
    return _NO_TEXT.sub("\ufffd", text)


def label(text: str) -> str:
    """A name that fits beside a figure."""
    text = clean(" ".join(text.split()))
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


def breakable(name: str) -> Any:
    """A long name with places where the line may break; escaped."""
    from markupsafe import Markup, escape

    text = str(escape(name))
    for mark in "./":
        text = text.replace(mark, f"{mark}<wbr>")
    return Markup(text)


FILTERS = {
    "figure": figure,
    "span": span,
    "share_with_span": share_with_span,
    "thousands": thousands,
    "breakable": breakable,
}
