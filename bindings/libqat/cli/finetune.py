"""`libqat finetune`: quantization-aware fine-tuning of a language model on text."""

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from libqat import finetune

from . import console

NAME = "finetune"
HELP = """Fine-tune a language model on the grid that its file will have.

The forward pass sees the numbers of the file, the loss is the KL divergence to the float model, and the
checkpoint holds exactly what was trained. Ctrl-C saves the state; --resume continues bit for bit.

Example: [bold]libqat finetune ./SmolLM2-135M --text book.txt --policy gguf-q4_0 --out out/run[/bold]
"""


class Objective(str, Enum):
    """What is minimised."""

    kl = "kl"
    ce = "ce"
    mix = "mix"


WEIGHTS = {
    Objective.kl: {"kl": 1.0, "ce": 0.0},
    Objective.ce: {"kl": 0.0, "ce": 1.0},
    Objective.mix: {"kl": 0.5, "ce": 0.5},
}


def run(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder or GGUF file.")],
    text: Annotated[list[Path], typer.Option(help="UTF-8 text file; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Run folder; the checkpoint is model.qat.safetensors in it.")],
    policy: Annotated[str, typer.Option(help="Preset name or JSON file.")] = "gguf-q4_0",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 2,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak; a cosine follows the warm-up.")] = 1e-4,
    objective: Annotated[
        Objective, typer.Option(help="KL to the float model, cross-entropy, or half of each.")
    ] = Objective.kl,
    frozen: Annotated[
        list[str] | None, typer.Option(help="Parameters not to train (regex). Default: the embedding.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the text.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    control: Annotated[
        bool,
        typer.Option("--control", help="Quantize nothing: the float model, fine-tuned in the same way."),
    ] = False,
) -> None:
    """See HELP."""
    started = finetune.start(
        model,
        finetune.tokenize_files(model, text),
        finetune.FLOAT if control else policy,
        out,
        resume=resume,
        text=text,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        accumulate=accumulate,
        learning_rate=learning_rate,
        objective=WEIGHTS[objective],
        frozen=list(finetune.FROZEN if frozen is None else frozen),
        seed=seed,
    )
    try:
        with console.progress("fine-tuning") as update:
            started.train(lambda report: update(report.step, report.steps, console.describe(report)))
    except KeyboardInterrupt:
        arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
        console.say(
            f"interrupted at step {started.trainer.step} of {steps}; the state is in {out}. Continue with:\n"
            f"libqat {shlex.join(arguments)} --resume"
        )
        raise typer.Exit(130) from None
    console.say(f"wrote {started.checkpoint}; next: libqat export {started.checkpoint} model.gguf")
