"""`libqat verify`: does an exported file hold the checkpoint's numbers?"""

from pathlib import Path
from typing import Annotated

import typer

import libqat

from . import console

NAME = "verify"
HELP = """Read an exported file by its consumer's rule and compare every number with a checkpoint.

The file may be a GGUF, a folder of any target, or a checkpoint. Exit code 0 when nothing differs, 1 with a
list of what does.

Example: [bold]libqat verify model.gguf --against out/run/model.qat.safetensors[/bold]
"""


def run(
    file: Annotated[Path, typer.Argument(help="The exported file or folder.")],
    against: Annotated[Path, typer.Option(help="The checkpoint it was exported from.")],
    json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """See HELP."""
    differences = libqat.verify(file, libqat.load(against))
    if json:
        fields = ("tensor", "what", "count", "first")
        console.print_json([{field: getattr(d, field) for field in fields} for d in differences])
    elif not differences:
        console.out.print(f"{file} holds exactly the numbers of {against}", highlight=False, soft_wrap=True)
    else:
        table = console.table("", "tensor", "what", ">count", "first difference")
        for difference in differences:
            table.add_row(difference.tensor, difference.what, str(difference.count), difference.first)
        console.out.print(table)
    if differences:
        console.say(f"{file}: {len(differences)} differences from {against}")
        if all(difference.what in ("codes", "scales") for difference in differences):
            console.say("every decoded weight is the same: these codes and scales say it in another way")
        raise typer.Exit(1)
