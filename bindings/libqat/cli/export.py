"""`libqat export`: a checkpoint as the file that a consumer reads."""

from pathlib import Path
from typing import Annotated

import typer

import libqat

from . import console

NAME = "export"
HELP = """Write a checkpoint as the file that llama.cpp, Ollama or LM Studio opens.

Codes and scales are packed as they are: nothing is quantized again.

Example: [bold]libqat export out/run/model.qat.safetensors model.gguf[/bold]
"""


def run(
    checkpoint: Annotated[Path, typer.Argument(help="A *.qat.safetensors file.")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    target: Annotated[str, typer.Option(help="Format of the file.")] = "gguf",
    tokenizer_from: Annotated[
        str,
        typer.Option(help="GGUF, tokenizer.json or Hugging Face folder. Default: where the checkpoint says."),
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """See HELP."""
    loaded = libqat.load(checkpoint)
    with console.progress(f"writing {out}") as update:
        libqat.export(loaded, out, target=target, tokenizer_from=tokenizer_from, progress=update)
    console.say(f"check it with: libqat verify {out} --against {checkpoint}")
    if json:
        console.print_json({"file": str(out), "target": target, "bytes": out.stat().st_size})
