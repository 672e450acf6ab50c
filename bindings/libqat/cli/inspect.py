"""`libqat inspect`: what a file holds."""

import json as json_module
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

import libqat
from libqat import _core

from . import console

NAME = "inspect"
HELP = """Show what a GGUF, a safetensors file or a libqat checkpoint holds.

Metadata, then each tensor with its grid, shape, bits per weight and bytes, then totals.

Example: [bold]libqat inspect model.gguf[/bold]
"""

_SHOWN_CHARACTERS = 76


def run(
    file: Annotated[Path, typer.Argument(help="*.gguf, *.safetensors or *.qat.safetensors.")],
    tensors: Annotated[bool, typer.Option(help="List the tensors, not only the totals.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """See HELP."""
    found = describe(file)
    if json:
        console.print_json(found)
        return
    _print_metadata(found)
    if tensors:
        _print_tensors(found["tensors"])
    _print_totals(found)


def describe(path: Path) -> dict[str, Any]:
    """{"file", "format", "bytes", "metadata", "tensors": [{"name", "grid", "shape", "bytes"}]} of a file."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise libqat.FileError(f"inspect: {path}: expected a readable file, got {error.strerror}") from error
    found = {"file": str(path), "bytes": path.stat().st_size}
    if magic == b"GGUF":
        header = _core.read_gguf_header(path)
        rows = [{**row, "grid": row["type"].lower()} for row in header["tensors"]]
        return found | {
            "format": f"GGUF version {header['version']}",
            "metadata": header["metadata"],
            "tensors": _without(rows, "type", "offset"),
        }
    header = _core.read_safetensors_header(path)
    if "libqat.format" in header["metadata"]:
        return found | _checkpoint(path, header)
    rows = [{**row, "grid": row["dtype"].lower()} for row in header["tensors"]]
    return found | {
        "format": "safetensors",
        "metadata": header["metadata"],
        "tensors": _without(rows, "dtype", "offset"),
    }


def _without(rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


def _checkpoint(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's tensors by their own names: codes and scales counted together."""
    libqat.load(path)  # everything validated, so that the rest may trust the metadata
    metadata = dict(header["metadata"])
    quantized = json_module.loads(metadata.pop("libqat.tensors"))
    rows = {}
    for part in header["tensors"]:
        name, _, field = part["name"].rpartition(".")
        if name in quantized and part["name"] not in quantized and field:
            row = rows.setdefault(
                name,
                {
                    "name": name,
                    "grid": quantized[name]["weight"],
                    "shape": quantized[name]["shape"],
                    "bytes": 0,
                },
            )
            row["bytes"] += part["bytes"]
        else:
            rows[part["name"]] = {
                "name": part["name"],
                "grid": part["dtype"].lower(),
                "shape": part["shape"],
                "bytes": part["bytes"],
            }
    tensors = [rows[name] for name in sorted(rows)]
    return {"format": "libqat checkpoint", "metadata": metadata, "tensors": tensors}


def _print_metadata(found: dict[str, Any]) -> None:
    table = console.table(f"{found['file']}: {found['format']}, {found['bytes']:,} bytes", "key", "value")
    for key, value in found["metadata"].items():
        text = value if isinstance(value, str) else json_module.dumps(value)
        text = " ".join(text.split())
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
        table.add_row(key, _plain(shown))
    console.out.print(table)


def _plain(text: str):
    from rich.text import Text

    return Text(text)  # brackets in a value are no markup


def _print_tensors(tensors: list[dict[str, Any]]) -> None:
    table = console.table("", "tensor", "grid", ">shape", ">bits", ">bytes")
    for row in tensors:
        shape = " x ".join(map(str, row["shape"]))
        bits = 8 * row["bytes"] / max(math.prod(row["shape"]), 1)
        table.add_row(_plain(row["name"]), row["grid"], shape, f"{bits:.2f}", f"{row['bytes']:,}")
    console.out.print(table)


def _print_totals(found: dict[str, Any]) -> None:
    table = console.table("", "grid", ">tensors", ">weights", ">bits per weight", ">bytes")
    groups = Counter(row["grid"] for row in found["tensors"])
    for grid, count in [*groups.most_common(), ("all", len(found["tensors"]))]:
        rows = [row for row in found["tensors"] if grid in (row["grid"], "all")]
        weights = sum(math.prod(row["shape"]) for row in rows)
        size = sum(row["bytes"] for row in rows)
        table.add_row(grid, str(count), f"{weights:,}", f"{8 * size / max(weights, 1):.3f}", f"{size:,}")
    console.out.print(table)
