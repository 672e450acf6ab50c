"""`libqat size`: what a model takes on disk under a policy, without its weights."""

from typing import Annotated, Any

import typer

from libqat import sizes
from libqat.sizes import Size

from . import console

NAME = "size"
HELP = """Say how many bytes a model takes under a policy, from its configuration alone.

By group of tensors: embedding, attention, MLP, experts and so on, scales included. With --format the tensors
are those of the exported file; its header and tokenizer come on top.

Example: [bold]libqat size --model-config gemma-4-e2b --policy gemma4-q4_0 --format gguf[/bold]
"""

TITLES = {
    "embedding": "token embedding",
    "layer_embedding": "per-layer embedding table",
    "layer_model_projection": "per-layer input projection",
    "layer_gates": "per-layer gates and projections",
    "attention": "attention",
    "mlp": "MLP",
    "experts": "experts",
    "router": "router",
    "norms": "norms and scalars",
    "head": "head",
    "other": "others",
}


def run(
    model_config: console.ModelConfig,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Preset name or JSON file. Default: everything stays float.",
            autocompletion=console.complete_policy,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Count the tensors of this file (a target of export). Default: the grids alone."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of tensors that stay float: bf16, f16 or f32.")] = "bf16",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """See HELP."""
    found = sizes.size(model_config, policy, format=format, dtype=dtype)
    for obstacle in found.refused[:4]:
        console.say(f"export would refuse {obstacle.tensor} ({obstacle.grid}): {obstacle.reason}")
    if len(found.refused) > 4:
        console.say(f"and {len(found.refused) - 4} more")
    if json:
        asked = {"model_config": model_config, "policy": policy, "format": format, "dtype": dtype}
        console.print_json(asked | as_json(found))
        return
    if tensors:
        _print_tensors(found)
    _print_groups(model_config, found)


def as_json(found: Size) -> dict[str, Any]:
    """Everything that is known of the size."""
    return {
        "weights": found.weights,
        "bytes": found.bytes,
        "bits_per_weight": found.bits_per_weight,
        "bytes_without_layer_embedding": found.bytes_without_layer_embedding,
        "groups": [vars(group) | {"bits_per_weight": group.bits_per_weight} for group in found.groups()],
        "tensors": [vars(tensor) for tensor in found.tensors],
        "refused": [
            {"tensor": each.tensor, "grid": each.grid, "reason": each.reason} for each in found.refused
        ],
    }


def _print_tensors(found: Size) -> None:
    table = console.table("", "tensor", "grid", ">shape", ">bytes")
    for row in found.tensors:
        table.add_row(row.name, row.grid, " x ".join(map(str, row.shape)), f"{row.bytes:,}")
    console.out.print(table)


def _print_groups(title: str, found: Size) -> None:
    table = console.table(title, "tensors", "grids", ">weights", ">bits per weight", ">bytes", ">GB")
    for group in found.groups():
        table.add_row(
            TITLES[group.group], ", ".join(group.grids), f"{group.weights:,}", f"{group.bits_per_weight:.3f}",
            f"{group.bytes:,}", f"{group.bytes / 1e9:.3f}",
        )  # fmt: skip
    table.add_section()
    table.add_row("all", "", f"{found.weights:,}", f"{found.bits_per_weight:.3f}", f"{found.bytes:,}",
                  f"{found.bytes / 1e9:.3f}")  # fmt: skip
    rest = found.bytes_without_layer_embedding
    if rest != found.bytes:
        table.add_row("without the per-layer table", "", "", "", f"{rest:,}", f"{rest / 1e9:.3f}")
    console.out.print(table)
