"""Fine-tuning a language model with libqat's own decoder and trainer, from files to a checkpoint."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _core, run_folder
from . import teacher as teachers
from ._core import CacheCheck, CacheProgress, LoadedModel, Policy, PreparedDecoder, StepReport, Trainer
from .data import read_texts, tokenize
from .prepare import as_policy
from .run_folder import CHECKPOINT
from .tokenizer import load_tokenizer

FLOAT = {"rules": []}
"""The policy that quantizes nothing: the control with which a fine-tuned model is compared."""
FROZEN = ("model\\.embed_tokens",)
"""Not trained by default: an embedding moves only for the tokens of the text, which hurts all others."""


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
        text = self.text
        if begun and not text and (self.folder / run_folder.FINETUNE).exists():
            text = run_folder.read_finetune(self.folder)["text"]
        control = not json.loads(self.prepared.policy.to_json())["rules"]
        run_folder.write_finetune(self.folder, self.model, text, control)

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
    text: Iterable[str | os.PathLike] = (),
    teacher_cache: str | os.PathLike | bool | None = None,
    teacher_top_k: int = teachers.TOP_K,
    on_cache: Callable[[CacheProgress], Any] | None = None,
    **options: Any,
) -> Run:
    """Loads and prepares a model, with the trainer at its first step (or where the run folder stands).

    model: Hugging Face folder or GGUF. tokens: int64[n], see `tokenize_files`. text: the files they came
    from, for the record (`finetune.json`, written when training begins). options: see
    `libqat.default_options()`. ArgumentError for bad options, policies and token ids; FileError when there is
    nothing to resume. A folder that holds a run although `resume` is false is a FileError of `Run.train`.

    teacher_cache: a file with the teacher's `teacher_top_k` most likely tokens at each position (True:
    `teacher.cache` in the folder). What this run needs of it and is missing is computed first, which
    `on_cache` follows; then no float model is kept in memory. It pays when the text is read more than once,
    by this run or by others.
    """
    options = _core.check_options(**options)
    policy = as_policy(policy)
    loaded = _core.load_model(model)
    data = _core.TokenData.from_tensor(tokens, json.loads(loaded.config)["vocab_size"])
    teacher, check = None, None
    wanted = _core.needs_teacher(**options)
    if wanted and not teacher_cache:
        teacher = teachers.live_teacher(loaded, options)
    prepared = _core.prepare_decoder(loaded.decoder, policy)
    if wanted and teacher_cache:
        path = teachers.cache_path(teacher_cache, folder)
        teacher, check = teachers.cached_teacher(
            path, loaded, prepared, data, teacher_top_k, options, on_cache
        )
    trainer = Trainer(prepared, teacher, data, folder, **options)
    if resume:
        trainer.resume()
    files = tuple(Path(path) for path in text)
    return Run(Path(folder), loaded, prepared, trainer, Path(model), files, check)


def tokenizer_source(model: str | os.PathLike) -> str:
    """Where a model's tokenizer is: the folder or GGUF itself, or what a checkpoint refers to."""
    path = Path(model)
    return _core.load(path).tokenizer if path.suffix == ".safetensors" else os.fspath(path)


def tokenize_files(model: str | os.PathLike, texts: Iterable[str | os.PathLike]) -> torch.Tensor:
    """The UTF-8 text files as one stream of the model's token ids, int64[n]."""
    return tokenize(load_tokenizer(tokenizer_source(model)), read_texts(texts))
