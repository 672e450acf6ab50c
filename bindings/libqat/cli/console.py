"""What all commands share on the terminal: progress, and JSON on request."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from libqat import Policy, StepReport
from libqat.configurations import model_config_names

Update = Callable[[int, int, str], None]
"""(done, total, note): one step of a stage."""

_SECONDS_BETWEEN_LINES = 10.0

out = Console()
"""Results. A pipe gets plain text of a fixed width."""
if not out.is_terminal:
    out = Console(width=120)


@contextmanager
def progress(title: str) -> Iterator[Update]:
    """A bar with the time left on a terminal; a plain line every ten seconds elsewhere. On standard error."""
    terminal = Console(stderr=True)
    if terminal.is_terminal:
        yield from _bar(title, terminal)
    else:
        yield from _lines(title)


def _bar(title: str, terminal: Console) -> Iterator[Update]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=terminal) as bar:
        task = bar.add_task(title, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


def _lines(title: str) -> Iterator[Update]:
    start = time.monotonic()
    last = start

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - start) / done * (total - done) if done else 0.0
        line = f"{title}: {done}/{total}, {clock(left)} left" + (f", {note}" if note else "")
        print(line, file=sys.stderr, flush=True)

    print(title, file=sys.stderr, flush=True)
    yield update


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def describe(report: StepReport) -> str:
    """A training step's note beside the bar."""
    return f"loss {report.loss:.4f}, {report.tokens_per_second:.0f} tokens/s"


def say(text: str) -> None:
    """A remark for the person at the terminal; not a result."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """A result for programs."""
    print(json.dumps(value, indent=2))


def read_json(path: Path) -> Any:
    """A JSON file that libqat wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(title: str, *columns: str):
    """A rich table; columns whose name begins with '>' are right-aligned."""
    from rich.table import Table

    result = Table(title=title or None, title_justify="left")
    for column in columns:
        result.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return result


def complete_policy(incomplete: str) -> list[str]:
    """What the shell offers for --policy: presets, then the JSON files of the present folder."""
    names = [*Policy.presets(), *sorted(str(path) for path in Path().glob("*.json"))]
    return [name for name in names if name.startswith(incomplete)]


def complete_model_config(incomplete: str) -> list[str]:
    """What the shell offers for --model-config: the published configurations, then folders and files."""
    names = [*model_config_names(), *sorted(str(path) for path in Path().glob("*/config.json"))]
    return [name for name in names if name.startswith(incomplete)]


ModelConfig = Annotated[
    str,
    typer.Option(
        help="A published configuration by name, or the path of a config.json or its folder.",
        autocompletion=complete_model_config,
    ),
]
"""The option --model-config."""
