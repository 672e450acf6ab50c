"""The page: a report's data, its figures and the template."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import libqat

from .._core import UnsupportedError
from . import formatting, overview, plots
from .curves import training_figures
from .data import ReportData
from .evaluation import ROWS, Task
from .findings import findings

_TEMPLATES = Path(__file__).parent / "templates"
_LISTED = 40
"""Frozen parameters that are named in their section; the table has all."""
SECTIONS = (
    ("summary", "Summary"),
    ("quality", "Quality"),
    ("training", "Training"),
    ("sizes", "Sizes"),
    ("layers", "Error by layer"),
    ("tensors", "Tensors"),
    ("weights", "Weights on their grid"),
)


class Card(NamedTuple):
    """A large figure of the headline."""

    label: str
    value: str
    detail: str


class Lede(NamedTuple):
    """The one sentence: what rounding costs, and what training won back."""

    before: str
    share: str
    after: str


def render(data: ReportData) -> str:
    """The HTML document. The same data gives the same text."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UnsupportedError(
            f"report: expected the package {error.name}, got none: pip install 'libqat[report]'"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(formatting.FILTERS)
    script = _read("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn = {name: _marked(value, Markup) for name, value in _figures(data).items()}
    html = environment.get_template("report.html").render(
        data=data,
        css=Markup(_read("report.css")),
        js=Markup(script),
        script_hash=f"sha256-{digest}",
        **drawn,
        **_words(data),
    )
    return formatting.clean(html)


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _marked(value: Any, markup: type) -> Any:
    """SVG is markup already; all other text on the page is escaped."""
    if isinstance(value, str):
        return markup(value) if value.startswith("<svg") else value
    return [_marked(item, markup) for item in value] if isinstance(value, list | tuple) else value


def _figures(data: ReportData) -> dict[str, Any]:
    tasks, options = data.evaluation, data.options
    unit = f"{formatting.objective(options['objective'])}, nats" if "objective" in options else ""
    return {
        "training_figures": training_figures(data.steps, options.get("clip_norm", 0.0), unit),
        "text_figures": _interval_figures(tasks.texts if tasks else [], "kl", "KL to float, nats per token"),
        "choice_figures": _interval_figures(tasks.choices if tasks else [], "accuracy", "Accuracy"),
        "metric_figures": _interval_figures(tasks.metrics if tasks else [], "value", "Value"),
        "order_figure": plots.order_figure(data.tensors),
        "weight_figures": [
            (
                shown,
                plots.latent_figure(shown, f"latent-{index}"),
                plots.occupancy_figure(shown, f"codes-{index}"),
            )
            for index, shown in enumerate(data.worst)
        ],
    }


def _interval_figures(tasks: Sequence[Task], field: str, axis: str) -> list[str]:
    return [plots.interval_figure(task, field, f"{field}-{index}", axis) for index, task in enumerate(tasks)]


def _words(data: ReportData) -> dict[str, Any]:
    frozen = [row for row in data.tensors if not row.trained]
    return {
        "version": libqat.__version__,
        "run": data.run or "RUN",
        "sections": SECTIONS,
        "row_names": ROWS,
        "lede": _lede(data),
        "cards": _cards(data),
        "facts": _facts(data),
        "findings": findings(data),
        "options": [(name, json.dumps(value)) for name, value in sorted(data.options.items())],
        "grids": overview.by_grid(data.tensors),
        "kinds": overview.by_kind(data.tensors),
        "maps": overview.heat_maps(data.tensors),
        "frozen": frozen[:_LISTED],
        "frozen_more": max(len(frozen) - _LISTED, 0),
        "bits_per_weight": _bits(data),
    }


def _bits(data: ReportData) -> float:
    weights = sum(row.weights for row in data.tensors)
    return 8 * sum(row.bytes for row in data.tensors) / max(weights, 1)


def _measured_text(data: ReportData) -> Task | None:
    """The first text on which both rounding's cost and training's gain were measured."""
    texts = data.evaluation.texts if data.evaluation else []
    for text in texts:
        ptq, qat = text.row("ptq"), text.row("qat")
        if text.kl_removed and text.kl_removed.value is not None and ptq and qat:
            return text
    return None


def _lede(data: ReportData) -> Lede:
    if data.control:
        return Lede(
            "The control: the float model, fine-tuned in the same way, with nothing quantized.", "", ""
        )
    text = _measured_text(data)
    if text is None:
        return Lede("What training won back of rounding's cost is not measured yet.", "", "")
    ptq, qat = (text.row(name).scores["kl"].value for name in ("ptq", "qat"))
    before = (
        f"On {text.name}, rounding costs {ptq:.3g} nats of KL per token. Training brings it to {qat:.3g}:"
    )
    return Lede(before, formatting.share_with_span(text.kl_removed), "of the cost is won back.")


def _cards(data: ReportData) -> list[Card]:
    size = sum(row.bytes for row in data.tensors)
    weights = sum(row.weights for row in data.tensors)
    cards = []
    for text in data.evaluation.texts[:2] if data.evaluation else []:
        removed = text.kl_removed
        if removed and removed.value is not None:
            low = formatting.span(removed.interval, "percent0") if removed.interval else ""
            cards.append(Card("KL removed", f"{removed.value:.0%}", text.name + (f" ({low})" if low else "")))
    shipped = data.file_bytes or size
    detail = f"{2 * weights / max(size, 1):.1f} times smaller than bfloat16"
    cards.append(Card("File", formatting.megabytes(shipped), detail))
    cards.append(
        Card("Bits per weight", f"{_bits(data):.2f}", f"{weights / 1e6:,.1f} million weights, scales counted")
    )
    trained = [row for row in data.tensors if row.trained and row.flip_rate is not None]
    total = sum(row.weights for row in trained)
    if total:
        flipped = sum(row.flip_rate * row.weights for row in trained) / total
        cards.append(Card("Codes changed", f"{flipped:.1%}", "of the trained tensors', against RTN"))
    return cards


def _facts(data: ReportData) -> list[tuple[str, str]]:
    facts = [("Policy", data.policy_name or "a user's own"), ("libqat", data.version)]
    options = data.options
    if data.steps and {"batch_size", "sequence_length", "accumulate"} <= options.keys():
        batch = options["batch_size"] * options["accumulate"]
        tokens = data.steps[-1]["step"] * batch * options["sequence_length"]
        facts.append(("Trained on", f"{tokens:,} tokens"))
        facts.append(
            ("Steps", f"{data.steps[-1]['step']:,} of {batch} × {options['sequence_length']} tokens")
        )
        if speed := data.steps[-1].get("tokens_per_second"):
            facts.append(("Time", f"{formatting.clock(tokens / speed)} at {speed:,.0f} tokens/s"))
    if "objective" in options:
        facts.append(("Objective", formatting.objective(options["objective"])))
    for name, label in (
        ("learning_rate", "Learning rate"),
        ("seed", "Seed"),
        ("compute_dtype", "Computed in"),
    ):
        if name in options:
            facts.append((label, str(options[name])))
    trained = sum(row.weights for row in data.tensors if row.trained)
    total = sum(row.weights for row in data.tensors)
    facts.append(("Trained weights", f"{trained / 1e6:,.1f} of {total / 1e6:,.1f} million"))
    if data.file:
        facts.append(("Checkpoint", data.file))
    return facts
