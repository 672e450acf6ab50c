"""The command line `libqat`: one file per command, each a few calls of the Python API."""

import os
import sys

import torch
import typer

import libqat

from . import (
    convert,
    export,
    fetch,
    finetune,
    inspect,
    plan_memory,
    policies,
    quantize,
    report,
    size,
    verify,
)  # fmt: skip
from . import eval as eval_command

app = typer.Typer(
    name="libqat",
    help=(
        "Quantization-aware training whose exported file holds exactly the trained numbers.\n\n"
        "A typical run: [bold]finetune[/bold] a model on text, [bold]export[/bold] the checkpoint, "
        "[bold]verify[/bold] the file, compare with [bold]eval[/bold]."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=(
        "Results go to standard output (as JSON with --json), progress and remarks to standard error. "
        "Exit codes: 0 done, 1 an error or a difference found, 2 wrong usage, 130 interrupted."
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        print(f"libqat {libqat.__version__} (torch {torch.__version__})")
        raise typer.Exit


for module in (
    finetune,
    quantize,
    export,
    convert,
    eval_command,
    report,
    inspect,
    verify,
    policies,
    size,
    plan_memory,
    fetch,
):
    app.command(module.NAME, help=module.HELP)(module.run)


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 error or difference, 2 wrong usage, 130 interrupted."""
    try:
        app()
    except Exception as error:
        if os.environ.get("LIBQAT_DEBUG") == "1":
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(1)


def _message(error: Exception) -> str:
    if isinstance(error, libqat.Error):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error} (LIBQAT_DEBUG=1 shows where)"
