"""`libqat eval`: models side by side on the same task."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

import libqat
from libqat import data, finetune, run_folder
from libqat.evaluated import EvaluationTask, evaluate, evaluate_run, open_model
from libqat.evaluation import FLOAT, RESAMPLES

from . import console

NAME = "eval"
HELP = """Compare models on texts, questions and metrics of your own, with 95 % intervals.

With a run folder of [bold]libqat finetune[/bold]: the float model, the same model rounded to nearest (ptq),
the trained one (qat), and whatever else is given. The result is kept in RUN/evaluation.json, where
[bold]libqat report[/bold] finds it. Otherwise name the float model with --reference. Without a task the text
is Python's language reference.

Models are Hugging Face folders, GGUF files, checkpoints or run folders; all see the same tokens, computed in
float32. KL to the float model is the figure to trust: perplexity also falls when a model merely learns the
text.

Example: [bold]libqat eval out/run --text other.txt --choices exam.jsonl --metric my.py:accuracy[/bold]

Example: [bold]libqat eval rtn.qat.safetensors out/run --reference ./SmolLM2-135M --text other.txt[/bold]
"""
DEFAULT_TEXT = "Python reference"
"""Text that every installation has, and few runs train on."""
_COSTS = {"kl": "KL", "nll": "loss"}


def run(
    models: Annotated[
        list[str], typer.Argument(help="A run folder, or models with --reference; NAME=PATH names a row.")
    ],
    text: Annotated[
        list[str] | None, typer.Option(help="UTF-8 text file or NAME=PATH; may be given several times.")
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(help="Multiple-choice questions, JSON Lines or NAME=PATH; may be given several times."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="module:function or file.py:function of a model; may be given several times."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The model to compare with, as a rule the float one.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="At most this many tokens of each text, spread over it.")
    ] = EvaluationTask.tokens,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens that are predicted together.")
    ] = EvaluationTask.window,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = EvaluationTask.batch,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")] = RESAMPLES,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """See HELP."""
    if reference is None and not run_folder.is_run_folder(models[0]):
        raise typer.BadParameter(
            f"expected a run folder (with {run_folder.RUN}) first, or --reference MODEL, got {models[0]}"
        )
    metrics = {name: load_metric(spec) for name, spec in named(metric or [], _function_name).items()}
    texts: dict[str, Any] = named(text or [], _stem)
    questions = named(choices or [], _stem)
    if not (texts or questions or metrics):
        console.say("no task given: scoring Python's language reference; see --text, --choices, --metric")
        texts = {DEFAULT_TEXT: data.python_topics()}
    task = EvaluationTask(
        texts=texts,
        choices=questions,
        metrics=metrics,
        tokens=tokens,
        window=window,
        batch=batch,
        resamples=resamples,
        seed=seed,
    )
    found = _compare(models, reference, task)
    if out is not None:
        run_folder.write_json(out, found)
    if json:
        console.print_json(found)
    else:
        print_found(found)


def _compare(models: list[str], reference: Path | None, task: EvaluationTask) -> dict[str, Any]:
    """The evaluation of a run folder, or of models beside a reference."""
    if reference is None:
        return evaluate_run(models[0], task, named(models[1:], str), console.progress)
    with console.progress("loading models"):
        opened = [open_model(reference, FLOAT)]
        opened += [open_model(path, row) for row, path in named(models, str).items()]
    source = finetune.tokenizer_source(reference)
    task.beginning = libqat.beginning_of_text(source)
    return evaluate(opened, task, libqat.load_tokenizer(source), console.progress)


def named(arguments: Iterable[str], name_of: Callable[[str], str]) -> dict[str, str]:
    """NAME=PATH or PATH each, as name -> path; an existing path may hold an =.

    ArgumentError when a name comes twice.
    """
    result: dict[str, str] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or not name or "/" in name or os.path.exists(argument):
            name, path = name_of(argument), argument
        if name in result:
            raise libqat.ArgumentError(
                f"eval: {argument}: expected different names, got {name} twice; NAME=PATH chooses another"
            )
        result[name] = path
    return result


def _stem(path: str) -> str:
    return Path(path).stem


def _function_name(spec: str) -> str:
    return spec.rpartition(":")[2]


def load_metric(spec: str) -> Callable:
    """The function of `module:function` or `path/to/file.py:function`; the current folder is importable."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise libqat.ArgumentError(f"eval: --metric {spec}: expected module:function or file.py:function")
    is_file = source.endswith(".py")
    for folder in (os.getcwd(), os.path.dirname(os.path.abspath(source))) if is_file else (os.getcwd(),):
        if folder not in sys.path:  # for what the module imports, now or when the function runs
            sys.path.insert(0, folder)
    try:
        module = _from_file(Path(source)) if is_file else importlib.import_module(source)
    except (ImportError, OSError, SyntaxError) as error:
        raise libqat.ArgumentError(f"eval: --metric {spec}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise libqat.ArgumentError(f"eval: --metric {spec}: expected a function {name} in {source}, got none")
    return function


def _from_file(path: Path):
    name = f"libqat_metric_{path.stem}"  # a user's json.py must not take json's place
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def print_found(found: dict[str, Any]) -> None:
    """Tables of an evaluation document."""
    bits = {model["row"]: f"{model['bits_per_weight']:.2f}" for model in found["models"]}
    for entry in found["texts"]:
        title = f"{entry['name']}: {entry['tokens']:,} predicted tokens in windows of {entry['window']}"
        table = console.table(title, "model", ">perplexity", ">KL to float", ">top-1", ">bits/weight")
        for row in entry["rows"]:
            cells = [_cell(row, "ppl", "{:.2f}"), _cell(row, "kl", "{:.4f}"), _cell(row, "top1", "{:.1%}")]
            table.add_row(row["row"], *cells, bits[row["row"]])
        console.out.print(table)
        if "kl_removed" in entry:
            shares = {what: _cell(entry, f"{key}_removed", "{:.1%}") for key, what in _COSTS.items()}
            told = " and ".join(f"{share} of the {what}" for what, share in shares.items() if share != "-")
            line = f"training removed {told} that rounding cost" if told else "rounding cost nothing here"
            console.out.print(line, highlight=False, soft_wrap=True)
    for entry in found["choices"]:
        title = f"{entry['name']}: {entry['questions']:,} questions"
        table = console.table(title, "model", ">accuracy", ">per byte", ">same as float", ">difference")
        for row in entry["rows"]:
            shares = [_cell(row, key, "{:.1%}") for key in ("accuracy", "accuracy_norm", "agreement")]
            table.add_row(row["row"], *shares, _cell(row, "difference", "{:+.1%}"))
        console.out.print(table)
    for entry in found["metrics"]:
        table = console.table(entry["name"], "model", ">value", ">difference to float")
        for row in entry["rows"]:
            table.add_row(row["row"], _cell(row, "value", "{:.4g}"), _cell(row, "difference", "{:+.4g}"))
        console.out.print(table)


def _cell(entry: dict[str, Any], key: str, form: str) -> str:
    """A figure with its interval."""
    if entry.get(key) is None:
        return "-"
    interval = entry.get(f"{key}_interval" if key != "value" else "interval")
    if not interval or interval[0] == interval[1]:
        return form.format(entry[key])
    return f"{form.format(entry[key])} ({form.format(interval[0])} to {form.format(interval[1])})"
