"""`libqat quantize`: round a model to a policy's grids without training."""

from pathlib import Path
from typing import Annotated

import typer

import libqat

from . import console

NAME = "quantize"
HELP = """Round a model to the nearest numbers of a policy's grids (RTN), without training.

This is the baseline that fine-tuning has to beat, and a quick way to a checkpoint.

Example: [bold]libqat quantize ./SmolLM2-135M --policy gguf-q4_0 --out rtn.qat.safetensors[/bold]
"""


def run(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder or GGUF file.")],
    policy: Annotated[str, typer.Option(help="Preset name or JSON file.")] = "gguf-q4_0",
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")] = Path("rtn.qat.safetensors"),
    report: Annotated[
        bool, typer.Option("--report", help="Print each tensor's grid, bits, error and bytes.")
    ] = False,
) -> None:
    """See HELP."""
    loaded = libqat.load_model(model)
    prepared = libqat.prepare(loaded.decoder, policy)
    if report:
        console.out.print(prepared.report())
    libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), out)
    console.say(f"wrote {out}")
