"""The main job on a real model: SmolLM2-135M fine-tuned on the Q4_0 grid, exported to GGUF, run by llama.cpp.

    make quickstart                    # or, after `make build`: .venv/bin/python examples/quickstart.py
    make quickstart ARGS=--control     # adds the float model, fine-tuned in the same way

Model and text come out of published Python packages (libqat.data). The C++ decoder and the C++ trainer do the
work; the teacher is the float model. Training starts from the solution of the PTQ method that libqat
recommends for the grid, on the text and on as much that the model writes. An interrupted run continues where
it was. Results: a table on standard output, and in the folder `--out` the checkpoint, the GGUF, report.html,
training.png and summary.json.
"""

import argparse
import math
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from libqat.cli import console, program
from libqat.cli.inspect import describe

import libqat
from libqat import data, finetune, html_report, llama_cpp, run_folder

MODEL = "SmolLM2-135M-Instruct"
POLICY = "gguf-q4_0"
WINDOW = 256
BATCH = 2
MARKUP = 0.3
"""Share of the training windows that show raw wikitext instead of prose: it helps on other kinds of text."""
START_TOKENS = 51_200
"""That the start looks at: half of the default, which takes twice the time for a few per cent of the KL."""
START = "start.qat.safetensors"
"""In the run folder: what training started from."""
PROMPT = "The sun rises in the east because"
GENERATED = 40
JUDGED = 301
"""Tokens that llama.cpp scores: the first has no prediction. Each costs a decoding step there."""
TITLES = {"wiki": "held-out Wikipedia", "other": "Python reference"}
NAMES = {"ptq": "rtn"}
"""Row of evaluation.json -> key in summary.json, where they differ."""
LABELS = {
    "float": "float",
    "rtn": "RTN Q4_0",
    "start": "{start} Q4_0, not trained",
    "qat": "QAT Q4_0 from {start}",
    "control": "float, tuned alike",
}
"""Row -> what the table calls it."""


def parse() -> argparse.Namespace:
    """The command line; the defaults are the published run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--steps", type=int, default=100, help=f"of {BATCH * WINDOW} tokens")
    parser.add_argument("--learning-rate", type=float, help="peak; default: what suits the grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--control", action="store_true", help="also fine-tune the float model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def read_texts(source: Path, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Training tokens int64[n], and per text `count` evaluation tokens."""
    console.say("reading Wikipedia and the Python reference")
    tokenizer = libqat.load_tokenizer(source)
    training, held_out = data.wikipedia_articles()
    console.say("tokenising")
    texts = {"wiki": [article.text for article in held_out], "other": data.python_topics()}
    spread = {
        name: data.spread_windows(data.tokenize(tokenizer, text), count, WINDOW)
        for name, text in texts.items()
    }
    prose = data.tokenize(tokenizer, [article.text for article in training])
    markup = data.tokenize(tokenizer, [article.markup for article in training])
    return mixed(prose, markup), spread


def mixed(prose: torch.Tensor, markup: torch.Tensor) -> torch.Tensor:
    """All windows of prose, and as many windows of wikitext as make up MARKUP of the whole."""
    windows = prose[: len(prose) // WINDOW * WINDOW].view(-1, WINDOW)
    count = round(len(windows) * MARKUP / (1 - MARKUP)) * WINDOW
    return torch.cat([windows.flatten(), data.spread_windows(markup, count, WINDOW)])


def rates(options: argparse.Namespace) -> dict[str, float]:
    """What libqat recommends for the grid: said here so that the float model is tuned alike."""
    recipe = libqat.recommended(libqat.Policy.preset(POLICY))
    given = options.learning_rate
    return {
        "learning_rate": recipe.learning_rate if given is None else given,
        "scale_learning_rate": recipe.scale_learning_rate,
        "final_learning_rate": recipe.final_learning_rate,
    }


def train(
    options: argparse.Namespace, source: Path, tokens: torch.Tensor, policy: str | Mapping, folder: Path
) -> Path:
    """Fine-tunes the model under a policy and returns the checkpoint; continues an interrupted run.

    Where the run starts at a PTQ method's solution, that is kept beside it, START.
    """
    resume = (folder / run_folder.STATE).exists()
    with console.progress("loading, rounding") as update:
        run = finetune.start(
            source,
            tokens,
            policy,
            folder,
            resume=resume,
            on_start=update,
            steps=options.steps,
            batch_size=BATCH,
            sequence_length=WINDOW,
            frozen=list(finetune.FROZEN),
            seed=options.seed,
            start_tokens=START_TOKENS,
            **rates(options),
        )
    if run.start != "none" and not resume:
        console.say(f"training starts from {run.start}")
        folder.mkdir(parents=True, exist_ok=True)
        libqat.save(run.prepared.freeze(run.loaded.config, run.loaded.tokenizer), folder / START)
    title = "fine-tuning on the Q4_0 grid" if policy == POLICY else "fine-tuning the float model"
    with console.progress(title) as update:
        run.train(lambda report: update(report.step, report.steps, console.describe(report)))
    return run.checkpoint


def round_to_nearest(source: Path, path: Path) -> Path:
    """The baseline: the same grids without training."""
    loaded = libqat.load_model(source)
    prepared = libqat.prepare(loaded.decoder, POLICY)
    libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), path)
    return path


def export(checkpoint_path: Path, gguf: Path) -> None:
    """Writes the GGUF and holds every number in it against the checkpoint."""
    checkpoint = libqat.load(checkpoint_path)
    with console.progress(f"writing {gguf}") as update:
        libqat.export(checkpoint, gguf, name=f"{MODEL} QAT Q4_0", progress=update)
    if differences := libqat.verify(gguf, checkpoint):
        raise libqat.FileError(
            f"{gguf}: {len(differences)} differences from the checkpoint: {differences[0]}"
        )


def score(models: list[libqat.EvaluatedModel], texts: dict[str, torch.Tensor], folder: Path) -> dict:
    """The entry "texts" of summary.json: everything in float32, from the numbers that ship.

    The same figures go into evaluation.json of the run folder.
    """
    named = {TITLES[name]: tokens for name, tokens in texts.items()}
    task = libqat.EvaluationTask(texts=named, window=WINDOW)
    found = libqat.evaluate(models, task, stage=console.progress)
    run_folder.merge_evaluation(folder, found)
    result = {}
    for name, entry in zip(texts, found["texts"], strict=True):
        rows = {row["row"]: row for row in entry["rows"]}
        result[name] = {
            "tokens": len(texts[name]),
            **{NAMES.get(row, row): {k: v for k, v in rows[row].items() if k != "row"} for row in rows},
            **{key: value for key, value in entry.items() if "_removed" in key},
        }
    return result


def judge(gguf: Path, ours: libqat.Decoder, tokens: torch.Tensor, threads: int) -> dict:
    """llama.cpp on the exported file: a sentence, and its score of the very tokens that ours scores."""
    with console.progress("llama.cpp writes a sentence and scores") as update:
        return llama_cpp.judge(
            gguf, ours, tokens, PROMPT, n_tokens=GENERATED, threads=threads, progress=update
        )


def report(options: argparse.Namespace) -> Path:
    """Everything about the run as one page. Its text came from a package, so the command is this program."""
    command = ["python", "examples/quickstart.py", "--steps", options.steps]
    if options.learning_rate is not None:
        command += ["--learning-rate", options.learning_rate]
    command += ["--seed", options.seed]
    with console.progress("writing the report") as update:
        return libqat.write_report(
            options.out / "run",
            options.out / "report.html",
            title=f"{MODEL} on the Q4_0 grid",
            command=shlex.join(map(str, command)),
            progress=update,
        )


def summarise(options: argparse.Namespace, steps: list[dict], scores: dict, gguf: Path, judged: dict) -> dict:
    """The content of summary.json."""
    tensors = describe(gguf)["tensors"]
    weights = sum(math.prod(tensor["shape"]) for tensor in tensors)
    tokens = options.steps * BATCH * WINDOW
    return {
        "model": MODEL,
        "policy": POLICY,
        "objective": "kl",
        "seed": options.seed,
        "start": run_folder.read_finetune(options.out / "run")["start"],
        **rates(options),
        "steps": options.steps,
        "tokens": tokens,
        "train_seconds": round(tokens / steps[-1]["tokens_per_second"], 1),
        "texts": scores,
        "bytes": gguf.stat().st_size,
        "bits_per_weight": 8 * sum(tensor["bytes"] for tensor in tensors) / weights,
        "gguf": str(gguf),
        "checkpoint": str(options.out / "run" / finetune.CHECKPOINT),
        "llama_cpp": judged,
    }


def with_interval(figures: dict, key: str, form: str) -> str:
    """A figure, and below it its 95 % interval."""
    if figures[key] is None:
        return "-"
    interval = figures.get(f"{key}_interval")
    if not interval or interval[0] == interval[1]:
        return form.format(figures[key])
    return f"{form.format(figures[key])}\n{form.format(interval[0])} - {form.format(interval[1])}"


def print_results(summary: dict, out: Path, seconds: float) -> None:
    """The table, and what goes with it."""
    judged = summary["llama_cpp"]
    columns = (
        "text",
        "model",
        ">ppl",
        ">KL to float",
        ">top-1",
        ">KL removed",
        ">loss removed",
        ">bits/weight",
    )
    table = console.table("", *columns)
    for name, text in summary["texts"].items():
        for row in [row for row in LABELS if row in text]:
            shares = [
                with_interval(text, share, "{:.0%}") if row == "qat" else "-"
                for share in ("kl_removed", "nll_removed")
            ]
            bits = 32 if row in ("float", "control") else summary["bits_per_weight"]
            formats = {"ppl": "{:.2f}", "kl": "{:.3f}", "top1": "{:.1%}"}
            figures = [with_interval(text[row], key, form) for key, form in formats.items()]
            table.add_row(TITLES[name], LABELS[row].format_map(summary), *figures, *shares, f"{bits:.2f}")
        table.add_section()
    console.out.print(table)
    tokens = summary["texts"]["wiki"]["tokens"]
    lines = [
        f"{tokens:,} tokens of each text, with 95 % intervals; removed: the share of the cost of rounding "
        "that start and training won back",
        f"{summary['gguf']}: {summary['bytes'] / 1e6:.1f} MB; no number differs from the checkpoint",
        f"llama.cpp ({judged['version']}) on {judged['tokens']} tokens: perplexity {judged['ppl']:.2f}; ours "
        f"on the same tokens {judged['ppl_ours_same_tokens']:.2f} (llama.cpp rounds activations to 8 bits)",
        f"llama.cpp writes: {judged['text']}",
        f"done in {console.clock(seconds)}; report: {summary['report']}, figures: {out / 'summary.json'}, "
        f"training curves: {out / 'training.png'}",
    ]
    console.out.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """All stages in order."""
    begin = time.monotonic()
    options = parse()
    out = options.out
    torch.set_num_threads(options.threads)
    out.mkdir(parents=True, exist_ok=True)
    source = data.smollm2_gguf()
    training, texts = read_texts(source, options.eval_tokens)

    qat = train(options, source, training, POLICY, out / "run")
    gguf = out / "smollm2-135m-qat-q4_0.gguf"
    export(qat, gguf)
    checkpoints = {
        "ptq": round_to_nearest(source, out / "rtn.qat.safetensors"),
        "start": out / "run" / START,
        "qat": qat,
    }
    if options.control:
        checkpoints["control"] = train(options, source, training, finetune.FLOAT, out / "control")

    steps = html_report.read_telemetry(out / "run" / "telemetry.jsonl")
    html_report.save_training_png(steps, out / "training.png", f"{MODEL} on the Q4_0 grid")
    paths = {"float": source, **checkpoints}
    models = {row: libqat.open_model(path, row) for row, path in paths.items()}
    scores = score(list(models.values()), texts, out / "run")
    judged = judge(gguf, models["qat"].decoder, texts["wiki"][:JUDGED], options.threads)
    del models
    summary = summarise(options, steps, scores, gguf, judged) | {"report": str(report(options))}
    path = out / "summary.json"
    run_folder.write_json(path, summary)
    print_results(summary, out, time.monotonic() - begin)


if __name__ == "__main__":
    program.run(main)
