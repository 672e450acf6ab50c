"""`libqat finetune`: quantization-aware fine-tuning of a language model on text."""

import shlex
import sys
from contextlib import ExitStack
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from libqat import StepReport, finetune, run_folder, teacher
from libqat import dry_run as planning

from . import console

NAME = "finetune"
HELP = """Fine-tune a language model on the grid that its file will have.

The forward pass sees the numbers of the file, the loss is the KL divergence to the float model, and the
checkpoint holds exactly what was trained. Ctrl-C saves the state; --resume continues bit for bit. --dry-run
takes two steps, writes nothing, and says what would be trained and what it would cost.

Example: [bold]libqat finetune ./SmolLM2-135M --text book.txt --policy gguf-q4_0 --out out/run[/bold]
"""


class Objective(str, Enum):
    """What is minimised."""

    kl = "kl"
    ce = "ce"
    mix = "mix"
    reverse_kl = "reverse-kl"
    jsd = "jsd"
    cakld = "cakld"


WEIGHTS = {
    Objective.kl: {"kl": 1.0, "ce": 0.0},
    Objective.ce: {"kl": 0.0, "ce": 1.0},
    Objective.mix: {"kl": 0.5, "ce": 0.5},
    Objective.reverse_kl: {"kl": 0.0, "reverse_kl": 1.0},
    Objective.jsd: {"kl": 0.0, "jsd": 1.0},
    Objective.cakld: {"kl": 0.0, "cakld": 1.0},
}


STARTS = (*finetune.STARTS, finetune.LATTICE, "none")


def run(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Hugging Face folder or GGUF file.")],
    text: Annotated[list[Path], typer.Option(help="UTF-8 text file; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Run folder; the checkpoint is model.qat.safetensors in it.")],
    policy: Annotated[
        str, typer.Option(help="Preset name or JSON file.", autocompletion=console.complete_policy)
    ] = "gguf-q4_0",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 2,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = finetune.WINDOW,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    start: Annotated[
        str | None,
        typer.Option(
            metavar=f"{'|'.join(STARTS)}|FILE",
            help="Where the weights start: at a PTQ method's solution on the run's own tokens, at the codes "
            "and scales that the model has already (lattice), where another run started (its --save-start), "
            "or as they are (none). Default: what came out best for the policy's grids.",
            autocompletion=lambda: list(STARTS),
        ),
    ] = None,
    start_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that guided and gptq look at, at most.", show_default="102,400"),
    ] = None,
    start_generated: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of these that the float model writes itself: such a start holds better on texts of "
            "other kinds.",
            show_default="0.5",
        ),
    ] = None,
    save_start: Annotated[
        Path | None,
        typer.Option(
            help="Keep the start in this *.safetensors, for --start of further runs: it takes long."
        ),
    ] = None,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(
            help="Keep here what a start asks of the float model, for runs under other policies: with the "
            "same model, text and seed they start in half of the time."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak; a cosine follows the warm-up.", show_default="by the grids"),
    ] = None,
    scale_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak for learned scales, as a share of their mean size; 0 holds them.",
            show_default="by the grids",
        ),
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option(help="KL to the float model, cross-entropy, half of each, or another divergence."),
    ] = Objective.kl,
    temperature: Annotated[float, typer.Option(help="At which divergences are taken.")] = 1.0,
    ema: Annotated[
        float, typer.Option(help="Decay of the average of the weights, which ships; 0 = off.")
    ] = 0.0,
    frozen: Annotated[
        list[str] | None, typer.Option(help="Parameters not to train (regex). Default: the embedding.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the text.")] = 0,
    options: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with further options of the run, docs/training.md lists them; what is given here "
            "counts more."
        ),
    ] = None,
    teacher_cache: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|auto",
            help="Ask the float model once and keep its answers in this file (auto: in the run folder). Pays "
            "when the text is read more than once, and saves the float model's memory.",
        ),
    ] = None,
    teacher_top_k: Annotated[
        int, typer.Option(min=1, help="Tokens per position that a teacher cache keeps.")
    ] = teacher.TOP_K,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    control: Annotated[
        bool,
        typer.Option("--control", help="Quantize nothing: the float model, fine-tuned in the same way."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, its bytes, memory and time; stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """See HELP."""
    policy = finetune.FLOAT if control else policy
    settings = _settings(
        context,
        options,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        accumulate=accumulate,
        learning_rate=learning_rate,
        scale_learning_rate=scale_learning_rate,
        objective=WEIGHTS[objective] | {"temperature": temperature},
        ema=ema,
        frozen=list(finetune.FROZEN if frozen is None else frozen),
        seed=seed,
    )
    tokens = finetune.tokenize_files(model, text, settings["sequence_length"])
    if dry_run:
        _plan(model, tokens, policy, settings, start, json)
        return
    started = _start(model, tokens, policy, out, teacher_cache, resume=resume, text=text, start=start,
                     start_tokens=start_tokens, start_generated=start_generated, save_start=save_start,
                     calibration_cache=calibration_cache, teacher_top_k=teacher_top_k,
                     **settings)  # fmt: skip
    last = _train(started, settings["steps"])
    for warning in started.trainer.warnings:
        console.say(f"warning: {warning}")
    console.say(f"wrote {started.checkpoint}; next: libqat export {started.checkpoint} model.gguf")
    if json:
        console.print_json(_outcome(started, last))


def _settings(context: typer.Context, file: Path | None, **given: Any) -> dict[str, Any]:
    """Options of a run: what the command line says, else what the file says, else the defaults."""

    def is_said(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    names = {name: (name, "temperature") if name == "objective" else (name,) for name in given}
    said = {name for name, arguments in names.items() if any(map(is_said, arguments))}
    read = run_folder.read_json(file) if file else {}
    known = {name: value for name, value in given.items() if value is not None}
    return known | read | {name: given[name] for name in said}


class _Stages(ExitStack):
    """Progress of work whose parts are known by name only when they begin."""

    title = ""

    def __call__(self, title: str, done: int, total: int, note: str = "") -> None:
        if title != self.title:
            self.close()
            self.title, self.update = title, self.enter_context(console.progress(title))
        self.update(done, total, note)


def _start(
    model: Path, tokens: torch.Tensor, policy: Any, out: Path, teacher_cache: str | None, **settings: Any
) -> finetune.Run:
    cached = {} if teacher_cache is None else {"teacher_cache": teacher_cache}
    try:
        with _Stages() as show:
            started = finetune.start(
                model, tokens, policy, out, **cached, **settings, on_start=partial(show, "rounding"),
                on_cache=lambda now: show(
                    "asking the teacher", now.done, now.total, f"{now.tokens_per_second:.0f} tokens/s"
                ),
            )  # fmt: skip
    except KeyboardInterrupt:
        console.say(
            "interrupted before training began; the teacher's answers so far are kept, and the same command "
            "goes on"
        )
        raise typer.Exit(130) from None
    if not settings["resume"]:
        seen = started.calibration.get("generated", 0)
        written = f", calibrated on {seen:,} tokens of its own too" if seen else ""
        console.say(
            f"starting from {'the float weights' if started.start == 'none' else started.start}{written}"
        )
    if check := started.cache_check:
        console.say(
            f"the cached teacher's loss is {check.cached:.4f}, the live one's {check.live:.4f} "
            f"({check.cached / check.live - 1:+.1%}); cosine of their gradients {check.cosine:.4f}, "
            f"over {check.tokens} tokens"
        )
    return started


def _train(started: finetune.Run, steps: int) -> StepReport | None:
    """The last step's report; None when the run was finished before."""
    last = None
    try:
        with console.progress("fine-tuning") as update:

            def show(report: StepReport) -> None:
                nonlocal last
                last = report
                update(report.step, report.steps, console.describe(report))

            started.train(show)
    except KeyboardInterrupt:
        arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
        console.say(
            f"interrupted at step {started.trainer.step} of {steps}; the state is in {started.folder}. "
            f"Continue with:\nlibqat {shlex.join(arguments)} --resume"
        )
        raise typer.Exit(130) from None
    return last


def _outcome(started: finetune.Run, last: StepReport | None) -> dict[str, Any]:
    return {
        "run": str(started.folder),
        "checkpoint": str(started.checkpoint),
        "bytes": started.checkpoint.stat().st_size,
        "steps": started.trainer.step,
        "loss": last.loss if last else None,
        "tokens_per_second": last.tokens_per_second if last else None,
        "warnings": started.trainer.warnings,
    }


def _plan(
    model: Path, tokens: torch.Tensor, policy: Any, options: dict[str, Any], start: str | None, json: bool
) -> None:
    with console.progress("trying two steps") as update:
        plan = planning.dry_run(
            model, tokens, policy, start=start, progress=lambda report: update(report.step, 2), **options
        )
    if json:
        console.print_json(plan)
        return
    table = console.table("what ships", "grid", ">tensors", ">trained", ">weights", ">bytes")
    for grid, row in plan["grids"].items():
        trained = sum(tensor["trained"] for tensor in plan["tensors"] if tensor["grid"] == grid)
        table.add_row(grid, str(row["tensors"]), str(trained), f"{row['weights']:,}", f"{row['bytes']:,}")
    console.out.print(table)
    console.out.print(_plan_text(plan, options["steps"]), highlight=False, soft_wrap=True)


def _plan_text(plan: dict[str, Any], steps: int) -> str:
    time, text = plan["time"], plan["tokens"]
    gigabytes = {name: f"{size / 1e9:.2f}" for name, size in plan["memory"].items()}
    lines = [
        f"start: {plan['start']}{'' if plan['start'] == 'none' else ', which takes time of its own'}",
        f"trained: {plan['trained_weights']:,} of {plan['weights']:,} weights",
        f"ships: {plan['bytes'] / 1e6:,.1f} MB, {plan['bits_per_weight']:.2f} bits per weight",
        "memory: {peak} GB at most: latents {latents}, gradients {gradients}, moments {moments}, and the "
        "teacher and activations".format(**gigabytes),
        f"time: {console.clock(time['seconds'])} for {steps} steps, measured over two of them "
        f"({time['tokens_per_second']:,.0f} tokens/s)",
        f"text: {text['text']:,} tokens, read {text['epochs']:.2f} times",
    ]
    return "\n".join(lines)
