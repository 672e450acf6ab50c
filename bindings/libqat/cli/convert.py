"""`libqat convert`: a file of one consumer as the file of another, with the same numbers."""

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

import libqat

from . import console

NAME = "convert"
HELP = """Take a model from one container to another without changing a number.

Reads a GGUF, an exported folder or a checkpoint, moves each tensor to a grid of the target that holds exactly
the same weights, writes the target and reads it back. When a tensor has no such grid, nothing is written and
the reasons are listed. Exit code 1 then.

Example: [bold]libqat convert model.gguf model-mlx --target mlx[/bold]

Example: [bold]libqat convert model.qat.safetensors other.qat.safetensors --grid int4_g32=q4_0[/bold]
"""

CHECKPOINT = "libqat"
Target = Enum("Target", {name: name for name in [*libqat.export_targets(), CHECKPOINT]}, type=str)
"""What to write; "libqat" is a checkpoint file."""


def run(
    source: Annotated[Path, typer.Argument(help="GGUF, exported folder or *.qat.safetensors.")],
    out: Annotated[Path, typer.Argument(help="File or folder to write.")],
    target: Annotated[
        Target | None,
        typer.Option(help="What to write. Default: what the name says (.gguf, .qat.safetensors)."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Move tensors to this grid first: GRID for all, FROM=GRID for those on grid FROM, or a "
            "regular expression of whole names. The first that matches counts; may be given again."
        ),
    ] = None,
    tokenizer_from: Annotated[
        str, typer.Option(help="GGUF, tokenizer.json or Hugging Face folder. Default: where the source says.")
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Folders: replace an earlier export that holds nothing else.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """See HELP."""
    name = target.value if target else _target_of(out)
    original = libqat.import_checkpoint(source)
    checkpoint = _moved(original, grid or [], json)
    if name == CHECKPOINT:
        libqat.save(checkpoint, out)
    else:
        _export(checkpoint, out, name, tokenizer_from, overwrite, json)
    written = _read_back(out, checkpoint, original) | {"file": str(out), "target": name}
    if json:
        console.print_json(written)
    else:
        _print(written)
    if written["differences"]:
        console.say(f"error: {out}: {len(written['differences'])} tensors differ from {source}")
        raise typer.Exit(1)


def _target_of(out: Path) -> str:
    if out.suffix == ".gguf":
        return "gguf"
    if out.name.endswith(".qat.safetensors"):
        return CHECKPOINT
    raise typer.BadParameter(f"{out}: its name does not say what to write", param_hint="--target")


def _export(
    checkpoint: libqat.QuantizedCheckpoint,
    out: Path,
    target: str,
    tokenizer: str,
    overwrite: bool,
    json: bool,
) -> None:
    try:
        with console.progress(f"writing {out}") as update:
            libqat.export(
                checkpoint, out, target=target, tokenizer_from=tokenizer, progress=update, overwrite=overwrite
            )
    except libqat.UnsupportedError:
        obstacles = libqat.can_export(checkpoint, target)
        if not any(row.tensor for row in obstacles):
            raise
        _refuse([(row.tensor, row.grid, row.reason) for row in obstacles], json)


def _moved(
    checkpoint: libqat.QuantizedCheckpoint, rules: list[str], json: bool
) -> libqat.QuantizedCheckpoint:
    """The checkpoint after the options --grid."""
    parsed = [_rule(rule) for rule in rules]
    grids = {}
    for key, own in checkpoint.grids.items():
        name = key.removesuffix(".weight")
        hits = [to for match, to in parsed if match == own or re.fullmatch(match, name)]
        if hits:
            grids[key] = hits[0]
    moved, refused = libqat.convert_tensors(checkpoint, grids)
    if refused:
        _refuse([(key, checkpoint.grids[key], reason) for key, reason in refused.items()], json)
    return moved


def _rule(text: str) -> tuple[str, str]:
    """(regular expression, grid) of "MATCH=GRID" or "GRID"."""
    match, separator, grid = text.rpartition("=")
    match = match if separator else ".*"
    try:
        re.compile(match)
    except re.error as error:
        raise typer.BadParameter(f"{match}: {error}", param_hint="--grid") from error
    return match, grid


def _refuse(rows: list[tuple[str, str, str]], json: bool) -> NoReturn:
    if json:
        fields = ("tensor", "grid", "reason")
        console.print_json([dict(zip(fields, row, strict=True)) for row in rows])
    else:
        table = console.table("", "tensor", "grid", "reason")
        for row in rows:
            table.add_row(*row)
        console.out.print(table)
    console.say(f"error: {len(rows)} tensors cannot be held exactly; nothing written")
    raise typer.Exit(1)


def _read_back(
    out: Path, checkpoint: libqat.QuantizedCheckpoint, original: libqat.QuantizedCheckpoint
) -> dict[str, Any]:
    """{"tensors": [{"tensor", "from", "to"}], "differences": [names]} of what has been written."""
    differences = [row.tensor for row in libqat.verify(out, checkpoint)]
    try:
        stored = libqat.import_checkpoint(out)
    except libqat.UnsupportedError:  # a folder of floats: `verify` has compared the weights
        stored = None
    rows = []
    for key, own in sorted(original.grids.items()):
        to = "float" if stored is None else stored.grids.get(key, "float")
        rows.append({"tensor": key, "from": own, "to": to})
        same = stored is None or torch.equal(stored.weight(key), original.weight(key))
        if not same and key not in differences:
            differences.append(key)
    return {"tensors": rows, "differences": differences}


def _print(written: dict[str, Any]) -> None:
    table = console.table(f"{written['file']} ({written['target']})", "from", "to", ">tensors")
    pairs = [(row["from"], row["to"]) for row in written["tensors"]]
    for pair in sorted(set(pairs)):
        table.add_row(*pair, f"{pairs.count(pair):,}")
    console.out.print(table)
    if not written["differences"]:
        console.out.print("read back: every number is the same", highlight=False)
