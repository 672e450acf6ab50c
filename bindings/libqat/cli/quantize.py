"""`libqat quantize`: round a model to a policy's grids without training."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import libqat

from . import console

NAME = "quantize"
HELP = """Round a model to the nearest numbers of a policy's grids, without training.

With the consumers' own scales (rtn) this is the baseline that fine-tuning has to beat, and a quick way to a
checkpoint. With searched scales (search) the weights' error is smaller, in files of the same size.

Example: [bold]libqat quantize ./SmolLM2-135M --policy gguf-q4_0 --out rtn.qat.safetensors[/bold]
"""


class Method(StrEnum):
    """Where the scales come from."""

    RTN = "rtn"
    SEARCH = "search"


def run(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder or GGUF file.")],
    policy: Annotated[
        str, typer.Option(help="Preset name or JSON file.", autocompletion=console.complete_policy)
    ] = "gguf-q4_0",
    method: Annotated[
        Method | None,
        typer.Option(
            help="rtn: the consumers' own scales; search: the scales of least error. Default: the policy's."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")] = Path("rtn.qat.safetensors"),
    report: Annotated[
        bool, typer.Option("--report", help="Print each tensor's grid, bits, error and bytes.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """See HELP."""
    loaded = libqat.load_model(model)
    chosen = libqat.Policy.load(policy)
    if method is not None:
        chosen = chosen.with_scale("search" if method is Method.SEARCH else "reference")
    prepared = libqat.prepare(loaded.decoder, chosen)
    rows = prepared.report()
    if report and not json:
        console.out.print(rows)
    libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), out)
    console.say(f"wrote {out}")
    if json:
        console.print_json(_outcome(out, rows))


def _outcome(out: Path, rows: libqat.Report) -> dict[str, Any]:
    return {
        "checkpoint": str(out),
        "bytes": out.stat().st_size,
        "bits_per_weight": rows.bits_per_weight,
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "grid": row.grid,
                "bits_per_weight": row.bits_per_weight,
                "bytes": row.bytes,
                "relative_error": row.relative_error,
            }
            for row in rows
        ],
    }
