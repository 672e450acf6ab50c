"""The experiments behind the defaults: one setting changed at a time, one seed, fewer judged tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import plots
import tables
from cases import Case, blocks_on, named
from models import Maker
from scoring import Scores
from texts import TITLES

import libqat


class Change(NamedTuple):
    """What differs from the recommended run."""

    name: str
    title: str
    options: dict[str, Any]
    estimator: dict[str, str] | None = None
    """Instead of the recipe's: `{"kind": ..., "scale": ...}`."""


STE = {"kind": "ste"}
LSQ = {"kind": "lsq"}
STABLE = {"kind": "stable_qat", "scale": "learned"}
TRUST = {"kind": "trust_mask", "scale": "learned"}


def from_gptq(grid: str) -> Change:
    """Another start, at the rates that are recommended for the recommended start alone."""
    recipe = libqat.recommended(libqat.Policy.from_json(json.dumps(blocks_on(grid))))
    rates = ("learning_rate", "scale_learning_rate", "final_learning_rate")
    return Change("gptq", "from GPTQ", {"start": "gptq"} | {rate: getattr(recipe, rate) for rate in rates})


STARTS = (
    Change("text", "start: the text alone", {"start_tokens": 51_200, "start_generated": 0.0}),
    Change("half", "start: half of the tokens", {"start_tokens": 51_200}),
)
CHANGES: dict[str, tuple[Change, ...]] = {
    "q4_0": (
        Change("plain", "from RTN, consumer's scales, 1e-4", {"start": "none", "learning_rate": 1e-4}, STE),
        Change(
            "search",
            "from RTN, searched scales, 1e-4",
            {"start": "none", "learning_rate": 1e-4},
            STE | {"scale": "search"},
        ),
        from_gptq("q4_0"),
        *STARTS,
        Change("held", "scales held", {"scale_learning_rate": 0.0}),
        Change("slow", "half the learning rate", {"learning_rate": 1e-4}),
        Change("fast", "twice the learning rate", {"learning_rate": 4e-4}),
        Change("lsq", "clipped STE (LSQ)", {}, LSQ),
        Change("stable", "StableQAT", {}, STABLE),
        Change("trust", "trust mask", {}, TRUST),
        Change("jsd", "loss: JSD", {"objective": {"kl": 0.0, "jsd": 1.0}}),
        Change("reverse", "loss: reverse KL", {"objective": {"kl": 0.0, "reverse_kl": 1.0}}),
        Change("ema", "average of the weights, 0.95", {"ema": 0.95}),
    ),
    "q2_0": (
        Change("plain", "from RTN, consumer's scales, 3e-4", {"start": "none", "learning_rate": 3e-4}, STE),
        from_gptq("q2_0"),
        *STARTS,
        Change("slow", "half the learning rate", {"learning_rate": 2e-4}),
        Change("fast", "twice the learning rate", {"learning_rate": 8e-4}),
        Change("held", "scales held", {"scale_learning_rate": 0.0}),
        Change("lsq", "clipped STE (LSQ)", {}, LSQ),
        Change("jsd", "loss: JSD", {"objective": {"kl": 0.0, "jsd": 1.0}}),
        Change("progressive", "4 bits first", {"progressive": [{"grid": "q4_0", "until": 0.2}]}),
    ),
}


def case_of(case: Case, change: Change) -> Case:
    """The case with that change."""
    policy = case.policy if change.estimator is None else case.policy | {"estimator": change.estimator}
    alike = not {"start", "start_tokens", "start_generated"} & change.options.keys()
    return replace(
        case,
        name=f"{case.name}-{change.name}",
        policy=policy,
        options=change.options,
        ptq=(),
        start_of=case.start_of if alike else "",
    )


def rows(maker: Maker, scores: Scores, name: str) -> list[dict]:
    """{"case", "change", "title", "text", "kl", "nats", "top1"} of a case; "" is the recommended run."""
    base = named(name)
    every = [Change("", "recommended", {}), *CHANGES[name]]
    runs = {change.name: maker.trained(case_of(base, change) if change.name else base, 0) for change in every}
    scored = scores.of({change: run.checkpoint for change, run in runs.items()})
    found = []
    for change in every:
        for text, score in scored[change.name].items():
            model, reference = score["model"], score["float"]
            entry = {"case": name, "change": change.name, "title": change.title, "text": text}
            entry |= {"eval_tokens": score["tokens"], "kl": model["kl"], "top1": model["top1"]}
            found.append(entry | {"nats": model["nll"] - reference["nll"]} | runs[change.name].entry())
    return found


def title(name: str) -> str:
    """Of a case's section."""
    return f"What the defaults rest on: `{name}`"


def section(found: list[dict], folder: Path) -> str:
    """The Markdown of a case's rows; its figure goes to `folder`."""
    name = found[0]["case"]
    settings: dict[str, dict[str, dict]] = {}
    for row in found:
        settings.setdefault(row["title"], {})[row["text"]] = row
    lines = [
        [setting, *(f"{texts[text]['kl']:.4f} ({texts[text]['nats']:.3f})" for text in TITLES)]
        for setting, texts in settings.items()
    ]
    judged = max(row["eval_tokens"] for row in found)
    text = (
        f"## {title(name)}\n\nOne setting changed at a time, seed 0, {judged:,} judged tokens of each text; "
    )
    text += "KL (and nats above the float model).\n\n"
    text += tables.table(["setting", *(f">{text}" for text in TITLES.values())], lines) + "\n"
    points = {
        setting: {text: [row["kl"]] for text, row in texts.items()} for setting, texts in settings.items()
    }
    return text + plots.dots(points, folder / f"settings-{name}.svg", "recommended")


__all__ = ["CHANGES", "case_of", "rows", "section", "title"]
