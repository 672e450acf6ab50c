"""Models from files and run folders, ready to be compared: float, rounded to nearest, trained."""

import functools
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import _core, run_folder
from ._core import ArgumentError, Decoder, FileError
from .choices import Question, read_choices
from .data import begin_windows, read_texts, spread_windows, tokenize
from .evaluation import FLOAT, PTQ, QAT, RESAMPLES, compare_choices, compare_metric, compare_text
from .finetune import tokenizer_source
from .prepare import as_policy
from .tokenizer import beginning_of_text, load_tokenizer

_FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}


@dataclass
class EvaluatedModel:
    """One row of a comparison."""

    row: str
    decoder: Decoder
    """In float32, without gradients."""
    path: str
    """Where it came from, absolute; "" for the rounded model, which is made in memory."""
    bytes: int
    """Of its tensors, as they are stored."""

    @property
    def bits_per_weight(self) -> float:
        """Mean over all parameters, tied ones counted once."""
        return 8 * self.bytes / sum(parameter.numel() for parameter in self.decoder.parameters().values())

    def entry(self) -> dict:
        """The model's entry in evaluation.json."""
        return {
            "row": self.row,
            "path": self.path,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
        }


def open_run(folder: str | os.PathLike) -> list[EvaluatedModel]:
    """The models of a run folder of `libqat finetune`: rows "float", "ptq" and "qat".

    float is the source model of finetune.json; ptq is that model rounded to nearest under the run's own
    policy; qat is the checkpoint. FileError when the folder, the source model or the checkpoint is missing or
    malformed.
    """
    folder = Path(folder)
    source = run_folder.read_finetune(folder)["model"]
    policy = run_folder.read_policy(folder)
    if not os.path.exists(source):
        raise FileError(
            f"open_run: {folder / run_folder.FINETUNE}: model: expected the source model, got no file at "
            f"{source}; correct the path there if the model has moved"
        )
    if not (folder / run_folder.CHECKPOINT).is_file():
        raise FileError(
            f"open_run: {folder / run_folder.CHECKPOINT}: expected a checkpoint, got none: the run is not "
            "finished; continue it with `libqat finetune ... --resume`"
        )
    return [
        open_model(source, FLOAT),
        _rounded(source, policy),
        open_model(folder / run_folder.CHECKPOINT, QAT),
    ]


def open_model(path: str | os.PathLike, row: str | None = None) -> EvaluatedModel:
    """A Hugging Face folder, a GGUF, a checkpoint (*.safetensors) or a run folder, whose checkpoint counts.

    row: its name, by default the path. A quantized tensor of a GGUF counts with the bytes that it has there,
    but in the row "float" as the float32 numbers that it is compared as.
    """
    row = os.fspath(path) if row is None else row
    path = Path(path)
    if run_folder.is_run_folder(path):
        path = path / run_folder.CHECKPOINT
    is_checkpoint = path.suffix == ".safetensors"
    decoder = (_core.load_checkpoint if is_checkpoint else _core.load_model)(path).decoder
    decoder.set_trainable(False)
    return EvaluatedModel(row, decoder, os.path.abspath(path), _stored_bytes(path, as_float=row == FLOAT))


@torch.no_grad()
def _rounded(source: str, policy: dict) -> EvaluatedModel:
    """The model under a policy without training, with the numbers of its grids as ordinary weights."""
    loaded = _core.load_model(source)
    prepared = _core.prepare_decoder(loaded.decoder, _untrained(as_policy(policy)))
    size = prepared.report().bytes
    checkpoint = prepared.freeze(loaded.config)
    loaded.decoder.set_trainable(False)
    for name, weight in loaded.decoder.parameters().items():
        if name in checkpoint.quantized:
            weight.copy_(checkpoint.weight(name))
    prepared.set_enabled(False)
    return EvaluatedModel(PTQ, loaded.decoder, "", size)


def _untrained(policy: _core.Policy) -> _core.Policy:
    """Learned scales say nothing about rounding without training: the consumer's own rule then."""
    scales = {policy.scale, *(rule["scale"] for rule in _estimators(policy))}
    return policy.with_scale("reference") if scales & {"learned", "seq"} else policy


def _estimators(policy: _core.Policy) -> list[dict]:
    rules = json.loads(policy.to_json())["rules"]
    return [{"scale": ""} | rule["estimator"] for rule in rules if "estimator" in rule]


def _stored_bytes(path: Path, as_float: bool) -> int:
    if path.is_dir():
        return sum(_stored_bytes(part, as_float) for part in _parts(path))
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if not is_gguf:
        return sum(tensor["bytes"] for tensor in _core.read_safetensors_header(path)["tensors"])
    tensors = _core.read_gguf_header(path)["tensors"]
    return sum(
        tensor["bytes"] if not as_float or tensor["type"] in _FLOAT_TYPES else 4 * math.prod(tensor["shape"])
        for tensor in tensors
    )


def _parts(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(run_folder.read_json(index)["weight_map"].values()))]


@dataclass
class EvaluationTask:
    """What to compare models on, and how."""

    texts: Mapping[str, str | os.PathLike | Sequence[str] | torch.Tensor] = field(default_factory=dict)
    """Name -> UTF-8 file, list of documents, or token ids int64[n], which are taken whole."""
    choices: Mapping[str, str | os.PathLike | Sequence[Question]] = field(default_factory=dict)
    """Name -> file of questions, see `read_choices`, or the questions."""
    metrics: Mapping[str, Callable] = field(default_factory=dict)
    """Name -> metric, see `compare_metric`. One with a parameter `tokenizer` gets the tokenizer there."""
    tokens: int = 65536
    """At most this many tokens of each text, as windows spread evenly over it."""
    window: int = 256
    batch: int = 4
    resamples: int = RESAMPLES
    seed: int = 0
    beginning: int | None = None
    """Token that each window and each question begins with, see `libqat.beginning_of_text`. `evaluate_run`
    asks the run's tokenizer when it is None."""


Stage = Callable[[str], AbstractContextManager[Callable[[int, int, str], Any]]]
"""Shows one stage: title -> a context whose value is called with (done, total, note)."""


@contextmanager
def _silent(title: str) -> Iterator[Callable[[int, int, str], None]]:
    yield lambda done, total, note: None


def evaluate(
    models: Sequence[EvaluatedModel], task: EvaluationTask, tokenizer: Any = None, stage: Stage = _silent
) -> dict[str, Any]:
    """Everything in `task` on all models, the first being the reference, as an evaluation document.

    tokenizer: a `tokenizers.Tokenizer`, see `libqat.load_tokenizer`, for texts that are no token ids yet.
    ArgumentError when two models have the
    same row name, and as the comparisons; FileError for the files.
    """
    rows = [model.row for model in models]
    for row in rows:
        if rows.count(row) > 1:
            raise ArgumentError(f"evaluate: models: {row}: expected different row names, got it twice")
    decoders = {model.row: model.decoder for model in models}
    streams = {name: _tokens(tokenizer, text, task) for name, text in task.texts.items()}
    questions = {name: _questions(source) for name, source in task.choices.items()}
    intervals = {"resamples": task.resamples, "seed": task.seed}
    found = run_folder.new_evaluation() | {"models": [model.entry() for model in models]}
    for name, tokens in streams.items():
        with stage(f"scoring {name}") as update:
            options = {"window": task.window, "batch": task.batch, "progress": _rate(update, "tokens")}
            found["texts"].append(compare_text(decoders, tokens, name=name, **options, **intervals))
    for name, asked in questions.items():
        with stage(f"choosing {name}") as update:
            options = {"progress": _rate(update, "choices")} | intervals
            options["beginning"] = task.beginning
            found["choices"].append(compare_choices(decoders, asked, tokenizer, name=name, **options))
    for name, metric in task.metrics.items():
        if _takes_tokenizer(metric):
            metric = functools.partial(metric, tokenizer=tokenizer)
        with stage(f"computing {name}"):
            found["metrics"].append(compare_metric(decoders, metric, name=name, **intervals))
    return found


def evaluate_run(
    folder: str | os.PathLike,
    task: EvaluationTask,
    more: Mapping[str, str | os.PathLike] | None = None,
    stage: Stage = _silent,
) -> dict[str, Any]:
    """`evaluate` on a run's float, ptq and qat models; the result goes into its evaluation.json.

    more: row name -> path of further models. Entries of the same name are replaced there, others stay.
    Returns the entries found now. Errors as `open_run`, `open_model` and `evaluate`.
    """
    with stage("loading models"):
        models = [*open_run(folder), *(open_model(path, row) for row, path in (more or {}).items())]
    source = tokenizer_source(run_folder.read_finetune(folder)["model"])
    if task.beginning is None:
        task = replace(task, beginning=beginning_of_text(source))
    found = evaluate(models, task, load_tokenizer(source), stage)
    run_folder.merge_evaluation(folder, found)
    return found


def _takes_tokenizer(metric: Callable) -> bool:
    try:
        return "tokenizer" in inspect.signature(metric).parameters
    except ValueError:  # some functions written in C tell no signature
        return False


def _tokens(tokenizer: Any, text: Any, task: EvaluationTask) -> torch.Tensor:
    if isinstance(text, torch.Tensor):
        return text
    documents = read_texts([text]) if isinstance(text, (str, os.PathLike)) else text
    tokens = begin_windows(tokenize(tokenizer, documents), task.beginning, task.window)
    return spread_windows(tokens, task.tokens, task.window)


def _questions(source: Any) -> Sequence[Question]:
    return read_choices(source) if isinstance(source, (str, os.PathLike)) else source


def _rate(update: Callable[[int, int, str], Any], unit: str) -> Callable[[int, int], Any]:
    begin = time.monotonic()

    def progress(done: int, total: int) -> Any:
        return update(done, total, f"{done / max(time.monotonic() - begin, 1e-9):.0f} {unit}/s")

    return progress
