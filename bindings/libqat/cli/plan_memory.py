"""`libqat plan-memory`: what training a model needs, and whether it fits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

import libqat
from libqat import finetune, memory
from libqat.devices import GB
from libqat.memory import PHASES, MemoryPlan, Settings

from . import console

NAME = "plan-memory"
HELP = """Say what training a model needs in memory, from its configuration alone, and whether it fits.

A map of one device: latents, optimizer, gradients, activations, teacher and so on, at the three times when
most is held. It counts libqat's own decoder and trainer; the policy trains as finetune would train it.

Example: [bold]libqat plan-memory --model-config gemma-4-31b --policy gemma4-q4_0 --devices 8xH200[/bold]
"""


def run(
    model_config: console.ModelConfig,
    policy: Annotated[
        str, typer.Option(help="Preset name or JSON file.", autocompletion=console.complete_policy)
    ] = "gguf-q4_0",
    control: Annotated[
        bool, typer.Option("--control", help="Quantize nothing: the float model, trained in the same way.")
    ] = False,
    devices: Annotated[
        str, typer.Option(help="8xH200, H100, 2x48GB, cpu (this machine) or cpu:64GB.")
    ] = "cpu",
    strategy: Annotated[
        str | None,
        typer.Option(
            help="single, ddp (a copy on each device) or fsdp (sharded).", show_default="by devices"
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(memory.OPTIMIZERS)}.")] = "adamw",
    teacher: Annotated[
        str, typer.Option(help="live (the float model beside it), cache (its answers on disk) or none.")
    ] = "live",
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", help="Sequences per device and step.")
    ] = 1,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", "--sequence", help="Tokens per sequence.")
    ] = 2048,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    frozen: Annotated[
        list[str] | None,
        typer.Option(help="Parameters not to train (regex). Default: the embeddings; '' trains everything."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Keep an average of the weights.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Activation checkpointing: layers compute twice.")
    ] = False,
    compute_dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """See HELP."""
    settings = Settings(
        batch_size=batch_size,
        sequence_length=sequence_length,
        accumulate=accumulate,
        optimizer=optimizer,
        teacher=teacher,
        ema=ema,
        compute_dtype=compute_dtype,
        frozen=finetune.FROZEN if frozen is None else tuple(filter(None, frozen)),
        recompute=recompute,
    )
    trained = None if control else libqat.recommended(libqat.Policy.load(policy)).policy

    def planned(settings: Settings) -> MemoryPlan:
        return memory.plan(model_config, trained, devices=devices, strategy=strategy, settings=settings)

    plan = planned(settings)
    if json:
        console.print_json(
            {"model_config": model_config, "policy": None if control else policy, "settings": vars(settings)}
            | as_json(plan)
        )
    else:
        _print(model_config, plan)
        if not plan.fits:
            _print_remedies(planned, settings)


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """Everything that the plan says."""
    return {
        "devices": vars(plan.devices),
        "strategy": plan.strategy,
        "weights": plan.weights,
        "trained_weights": plan.trained,
        "items": [{"name": item.name, "bytes": item.bytes, "phases": item.phases} for item in plan.items],
        "phases": {phase: plan.bytes_in(phase) for phase in PHASES},
        "peak": plan.peak,
        "usable": plan.usable,
        "fits": plan.fits,
    }


def _print(title: str, plan: MemoryPlan) -> None:
    count = plan.devices.count
    heading = (
        f"{title}: each of {count} x {plan.devices.name}, {plan.strategy}"
        if count > 1
        else (f"{title}: {plan.devices.name}")
    )
    table = console.table(heading, "GB", *(f">in the {phase}" for phase in PHASES))
    for item in plan.items:
        shown = f"{item.bytes / GB:,.3f}"
        table.add_row(item.name, *(shown if phase in item.phases else "" for phase in PHASES))
    table.add_section()
    table.add_row("all", *(f"{plan.bytes_in(phase) / GB:,.3f}" for phase in PHASES))
    console.out.print(table)
    console.out.print(
        f"{plan.weights:,} weights, {plan.trained:,} of them trained.\n"
        f"Peak {plan.peak / GB:,.2f} GB of {plan.usable / GB:,.2f} usable "
        f"({plan.devices.bytes / GB:,.0f} GB a device): {'fits' if plan.fits else 'does not fit'}."
    )


_REMEDIES = (
    ("--recompute", {"recompute": True}),
    ("--teacher cache", {"teacher": "cache"}),
    ("--recompute --teacher cache", {"recompute": True, "teacher": "cache"}),
    ("--recompute --teacher cache --optimizer adamw-8bit",
     {"recompute": True, "teacher": "cache", "optimizer": "adamw-8bit"}),
)  # fmt: skip
"""The first that helps is named: what costs least time comes first."""


def _print_remedies(planned: Callable[[Settings], MemoryPlan], settings: Settings) -> None:
    for options, changes in _REMEDIES:
        changed = planned(replace(settings, **changes))
        if changed.fits:
            console.out.print(f"With {options} it would: {changed.peak / GB:,.2f} GB.")
            return
    console.out.print(f"Nor with {_REMEDIES[-1][0]}: {changed.peak / GB:,.2f} GB.")
