"""`libqat export`: a checkpoint as the file that a consumer reads."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import libqat

from . import console

NAME = "export"
HELP = """Write a checkpoint as the file or folder that a consumer opens.

gguf is for llama.cpp, Ollama and LM Studio, compressed-tensors for transformers and vLLM, gemma-mobile for
transformers, mlx for mlx-lm: codes and scales are packed as they are, nothing is quantized again. hf is a
Hugging Face folder with the dequantized weights; the command says whether quantizing those again gives back
the trained numbers. What a target cannot hold exactly is refused, with a list of the tensors.

Example: [bold]libqat export out/run/model.qat.safetensors model.gguf[/bold]

Example: [bold]libqat export out/run/model.qat.safetensors model-hf --target hf[/bold]
"""


Target = Enum("Target", {name: name for name in libqat.export_targets()}, type=str)
"""What to write."""
GGUF = Target("gguf")


class Dtype(str, Enum):
    """Float types of a folder."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def run(
    checkpoint: Annotated[Path, typer.Argument(help="A *.qat.safetensors file.")],
    out: Annotated[Path, typer.Argument(help="File or folder to write.")],
    target: Annotated[Target, typer.Option(help="What to write.")] = GGUF,
    tokenizer_from: Annotated[
        str,
        typer.Option(help="GGUF, tokenizer.json or Hugging Face folder. Default: where the checkpoint says."),
    ] = "",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Folders: the model's type. Default: the narrowest that is exact.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Folders: bytes per file, like 5GB. Default: 50GB.")
    ] = None,
    require_exact: Annotated[
        bool, typer.Option("--require-exact", help="hf: refuse unless requantizing gives the same bytes.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Folders: replace an earlier export that holds nothing else.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """See HELP."""
    loaded = libqat.load(checkpoint)
    exactness = {"dtype": dtype.value if dtype else "", "require_exact": require_exact}
    try:
        with console.progress(f"writing {out}") as update:
            libqat.export(
                loaded,
                out,
                target=target.value,
                tokenizer_from=tokenizer_from,
                progress=update,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                **exactness,
            )
    except libqat.UnsupportedError:
        obstacles = [row for row in libqat.can_export(loaded, target.value, **exactness) if row.tensor]
        if not obstacles:
            raise
        _refuse(checkpoint, target.value, obstacles, json)
    written = describe(out, target)
    if json:
        console.print_json(written)
    elif target.value == "hf":
        _print(written)
    console.say(f"check it with: libqat verify {out} --against {checkpoint}")


def _refuse(checkpoint: Path, target: str, obstacles: list[libqat.Obstacle], json: bool) -> NoReturn:
    """Lists every tensor in the way and ends with exit code 1."""
    if json:
        fields = ("tensor", "grid", "reason")
        console.print_json([{field: getattr(row, field) for field in fields} for row in obstacles])
    else:
        table = console.table("", "tensor", "grid", "reason")
        for row in obstacles:
            table.add_row(row.tensor, row.grid, row.reason)
        console.out.print(table)
    count = len(obstacles)
    console.say(f"error: {checkpoint}: target {target} cannot hold {count} tensors exactly; nothing written")
    raise typer.Exit(1)


def describe(out: Path, target: Target) -> dict[str, Any]:
    """{"file", "target", "bytes"}, and for a folder what its libqat.json says of the weights."""
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    written = {"file": str(out), "target": target.value, "bytes": sum(path.stat().st_size for path in files)}
    if target.value != "hf":
        return written
    manifest = console.read_json(out / "libqat.json")
    return written | {key: manifest[key] for key in ("dtype", "exact", "requantizes_exactly", "tensors")}


def _print(written: dict[str, Any]) -> None:
    rows = written["tensors"].values()
    held = "exactly as trained" if written["exact"] else "rounded; the checkpoint holds them exactly"
    console.out.print(
        f"{written['file']}: {written['dtype']} weights, {held}", highlight=False, soft_wrap=True
    )
    table = console.table(
        "Quantized again by the grid's own rule", "grid", ">tensors", ">blocks", ">that change"
    )
    for grid in sorted({row["grid"] for row in rows}):
        same = [row for row in rows if row["grid"] == grid]
        blocks, changed = (sum(row[key] for row in same) for key in ("blocks", "changed_blocks"))
        table.add_row(grid, f"{len(same):,}", f"{blocks:,}", f"{changed:,}")
    if rows:
        console.out.print(table)
