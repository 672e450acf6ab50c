"""Fine-tuning a language model with libqat's own decoder and trainer, from files to a checkpoint."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import _core, calibrations, generation, ptq, run_folder, starts
from . import teacher as teachers
from ._core import (
    ArgumentError,
    CacheCheck,
    CacheProgress,
    Decoder,
    LoadedModel,
    Policy,
    PreparedDecoder,
    StepReport,
    Trainer,
)
from .data import begin_windows, read_texts, tokenize
from .lattices import lattice, take_up
from .prepare import as_policy
from .run_folder import CHECKPOINT, read_json
from .tokenizer import beginning_of_text, load_tokenizer

FLOAT = {"rules": []}
"""The policy that quantizes nothing: the control with which a fine-tuned model is compared."""
FROZEN = ("model\\.embed_tokens(_per_layer)?",)
"""Not trained by default: an embedding moves only for the tokens of the text, which hurts all others."""

STARTS = {"guided": ptq.guided, "gptq": ptq.gptq}
"""Methods whose solution a run can start from."""
LATTICE = "lattice"
"""The start at the codes and scales that a model has already."""
WINDOW = 256
"""Tokens of a sequence, where nothing else is said."""


@dataclass
class Run:
    """A model ready to be fine-tuned in a run folder."""

    folder: Path
    loaded: LoadedModel
    prepared: PreparedDecoder
    trainer: Trainer
    model: Path
    """Where `loaded` came from."""
    text: tuple[Path, ...] = ()
    """The files of the training text, when they are known."""
    start: str = "none"
    """The PTQ method whose solution the weights started from."""
    calibration: dict[str, int] = field(default_factory=dict)
    """Tokens that it saw: {"text": of the training text, "generated": written by the float model}. Empty
    where a run goes on: finetune.json keeps them."""
    cache_check: CacheCheck | None = None
    """Of a teacher cache that was built for this run: its loss beside the live teacher's."""

    def train(self, progress: Callable[[StepReport], Any] | None = None) -> bool:
        """Trains and writes the checkpoint. False when `progress` stopped it; the state is saved then.

        On Ctrl-C the step under way is finished and the state saved before KeyboardInterrupt is raised.
        """
        self._record()
        if not self.trainer.run(progress):
            return False
        _core.save(self.prepared.freeze(self.loaded.config, self.loaded.tokenizer), self.checkpoint)
        return True

    def _record(self) -> None:
        """Writes finetune.json, unless the folder holds another run, which the trainer will refuse."""
        begun = (self.folder / run_folder.STATE).exists()
        if begun and self.trainer.step == 0:
            return
        text, start, calibration = self.text, self.start, self.calibration
        if begun and (self.folder / run_folder.FINETUNE).exists():
            kept = run_folder.read_finetune(self.folder)
            text, start, calibration = text or kept["text"], kept["start"], kept["calibration"]
        control = not json.loads(self.prepared.policy.to_json())["rules"]
        run_folder.write_finetune(self.folder, self.model, text, control, start, calibration)

    @property
    def checkpoint(self) -> Path:
        """Where `train` writes what ships."""
        return self.folder / CHECKPOINT


def start(
    model: str | os.PathLike,
    tokens: torch.Tensor,
    policy: "str | os.PathLike | Mapping | Policy",
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    start: str | os.PathLike | None = None,
    start_tokens: int | None = None,
    start_generated: float | None = None,
    save_start: str | os.PathLike | None = None,
    calibration_cache: str | os.PathLike | None = None,
    on_start: ptq.Progress | None = None,
    text: Iterable[str | os.PathLike] = (),
    teacher_cache: str | os.PathLike | bool | None = None,
    teacher_top_k: int = teachers.TOP_K,
    on_cache: Callable[[CacheProgress], Any] | None = None,
    **options: Any,
) -> Run:
    """Loads and prepares a model, with the trainer at its first step (or where the run folder stands).

    model: Hugging Face folder or GGUF. tokens: int64[n], see `tokenize_files`. text: the files they came
    from, for the record (`finetune.json`, written when training begins). options: see
    `libqat.default_options()`.

    start: "guided" or "gptq", a PTQ method that first rounds the model by the tokens that the run trains on,
    at most `start_tokens` (but a window of each) with those that the float model writes itself, a share of
    `start_generated` (see `libqat.generate`; by default 102,400, and half of them); training goes on from its
    solution, with learned scales.
    "lattice": at the codes and scales that the model has already, see `libqat.lattice` (float checkpoints
    that were trained on a grid) and `libqat.take_up` (folders of codes and scales on the policy's grids).
    A *.safetensors file: where another run started, which that one wrote as `save_start`.
    calibration_cache: a file that keeps the text that the model writes and what "guided" asks of the float
    model, for starts of the same model, text, options and seed under other policies: the same bits, sooner.
    "none": from the model as it is. By default, and for the learning rates that `options` leave out, what
    `libqat.recommended` says for the policy, whose estimator goes with a start. on_start follows it.

    ArgumentError for bad options, policies and token ids; FileError when there is
    nothing to resume. A folder that holds a run although `resume` is false is a FileError of `Run.train`.

    teacher_cache: a file with the teacher's `teacher_top_k` most likely tokens at each position (True:
    `teacher.cache` in the folder). What this run needs of it and is missing is computed first, which
    `on_cache` follows; then no float model is kept in memory. It pays when the text is read more than once,
    by this run or by others.
    """
    policy, start, options = settled(policy, start, options)
    if save_start is not None:
        starts.check_writable(save_start, start)
    share = _start_text(policy, start, start_tokens, start_generated)
    if calibration_cache is not None and start not in STARTS:
        raise ArgumentError(f"calibration_cache: expected a start that looks at text, got start {start!r}")
    loaded = _core.load_model(model)
    data = _core.TokenData.from_tensor(tokens, json.loads(loaded.config)["vocab_size"])
    teacher, check, calibration, cache = None, None, {}, None
    wanted = _core.needs_teacher(**options)
    if wanted and not teacher_cache:
        teacher = teachers.float_copy(loaded, options["compute_dtype"])
    if start in STARTS and not resume:  # while the model is float
        first = calibrations.first_windows(data, options, *share)
        if calibration_cache is not None:
            cache = calibrations.of_run(calibration_cache, loaded, first, share[1], options)
        calibration = calibrations.windows(
            loaded, model, first, share[1], options, teacher=teacher, cache=cache, progress=on_start
        )
    prepared = _core.prepare_decoder(loaded.decoder, policy)
    if wanted and teacher_cache:
        path = teachers.cache_path(teacher_cache, folder)
        teacher, check = teachers.cached_teacher(
            path, loaded, prepared, data, teacher_top_k, options, on_cache
        )
    seen = {source: windows.numel() for source, windows in calibration.items()}
    if not resume:
        begun = starts.Start(start, seen)
        start, seen = _begin(begun, Path(model), prepared, calibration, options, cache, on_start)
        if save_start is not None:
            starts.save_start(prepared, starts.Start(start, seen), save_start)
    trainer = Trainer(prepared, teacher, data, folder, **options)
    if resume:
        trainer.resume()
    if isinstance(teacher, Decoder):
        teachers.share_frozen(teacher, loaded.decoder)
    files = tuple(Path(path) for path in text)
    return Run(Path(folder), loaded, prepared, trainer, Path(model), files, start, seen, check)


def settled(
    policy: "str | os.PathLike | Mapping | Policy",
    start: str | os.PathLike | None,
    options: Mapping[str, Any],
) -> tuple[Policy, str, dict[str, Any]]:
    """Policy, start and all options of a run, with what is recommended where they do not say."""
    policy = as_policy(policy)
    recipe = _core.recommended(policy)
    start = recipe.start if start is None else os.fspath(start)
    if start not in (*STARTS, LATTICE, "none") and starts.path_of(start) is None:
        names = f"{', '.join(STARTS)}, {LATTICE}, none or a *.safetensors file"
        raise ArgumentError(f"start: expected one of {names}, got {start!r}")
    rates = ("learning_rate", "scale_learning_rate", "final_learning_rate")
    recommended = start == recipe.start or starts.path_of(start) is not None
    known = {rate: getattr(recipe, rate) for rate in rates} if recommended else {}
    return (
        policy if start == "none" else recipe.policy,
        start,
        _core.check_options(**(known | dict(options))),
    )


def _start_text(policy: Policy, start: str, tokens: int | None, generated: float | None) -> tuple[int, float]:
    """Tokens that the start looks at, and the share that the model writes, as recommended if not given."""
    if generated and start not in STARTS:
        raise ArgumentError(f"start_generated: expected a start that looks at text, got start {start!r}")
    recipe = _core.recommended(policy)
    tokens = recipe.start_tokens if tokens is None else tokens
    generated = recipe.start_generated if generated is None else generated
    if tokens < 1 or not 0 <= generated < 1:
        got = f"{tokens} and {generated}"
        raise ArgumentError(f"start_tokens, start_generated: expected at least 1 and 0 <= x < 1, got {got}")
    return tokens, generated


def _begin(
    start: starts.Start,
    model: Path,
    prepared: PreparedDecoder,
    calibration: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    cache: calibrations.CalibrationCache | None,
    progress: ptq.Progress | None,
) -> starts.Start:
    """Takes the model to where the run starts; how that was made."""
    if (kept := starts.path_of(start.method)) is not None:
        return starts.load_start(prepared, kept)
    if start.method == LATTICE:
        _take_codes(model, prepared, progress)
    elif calibration:
        windows = generation.mixed(list(calibration.values()), options["seed"])
        common = {"compute_dtype": options["compute_dtype"], "progress": progress}
        if start.method == "guided" and cache is not None:
            known = cache.sensitivity(prepared, lambda: ptq.sensitivity(prepared, windows, **common))
            ptq.guided(prepared, windows, sensitivity=known, **common)
        else:
            STARTS[start.method](prepared, windows, **common)
    return start


def _take_codes(model: Path, prepared: PreparedDecoder, progress: ptq.Progress | None) -> None:
    """What the model is made of: codes and scales, or floats that lie on a lattice."""
    config = read_json(model / "config.json") if model.is_dir() else {}
    if "quant_method" in (config.get("quantization_config") or {}):
        take_up(prepared, _core.import_checkpoint(model))
    else:
        lattice(prepared, progress=progress)


def tokenizer_source(model: str | os.PathLike) -> str:
    """Where a model's tokenizer is: the folder or GGUF itself, or what a checkpoint refers to."""
    path = Path(model)
    return _core.load(path).tokenizer if path.suffix == ".safetensors" else os.fspath(path)


def tokenize_files(
    model: str | os.PathLike, texts: Iterable[str | os.PathLike], window: int = WINDOW
) -> torch.Tensor:
    """The UTF-8 text files as one stream of the model's token ids, int64[n].

    window: the tokens that will be read together, `sequence_length` of a run. Each window begins with the
    token that texts of the model begin with, if there is one, see `libqat.beginning_of_text`.
    """
    source = tokenizer_source(model)
    ids = tokenize(load_tokenizer(source), read_texts(texts))
    return begin_windows(ids, beginning_of_text(source), window)
