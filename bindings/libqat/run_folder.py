"""What Python adds to a run folder: where the run came from, and how its result was evaluated.

The trainer writes run.json (options and policy), state.safetensors and telemetry.jsonl; `libqat.finetune`
adds finetune.json and the checkpoint, `libqat eval` adds evaluation.json. JSON files appear whole or not at
all.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ._core import FileError
from ._files import replace_file

CHECKPOINT = "model.qat.safetensors"
"""What ships."""
RUN = "run.json"
"""The trainer's options and policy."""
STATE = "state.safetensors"
"""What a run resumes from."""
FINETUNE = "finetune.json"
"""{"libqat": version, "model": path of the source, "text": [paths], "control": bool, "start": PTQ method or
"none", "calibration": {"text": tokens, "generated": tokens} that it saw}, paths absolute."""
EVALUATION = "evaluation.json"
"""Scores of float, ptq and qat; see `read_evaluation`."""

_FORMAT = 1
_NAMED = {"models": "row", "texts": "name", "choices": "name", "metrics": "name"}
"""List of evaluation.json -> the key that names an entry."""


def is_run_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder that a trainer wrote into."""
    return (Path(path) / RUN).is_file()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON; the file appears whole or not at all. FileError naming the path.

    ValueError for NaN and infinities, which JSON lacks.
    """
    content = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, content.encode(), "write_json")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object. FileError when the file is missing, is not UTF-8 JSON or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"read_json: {path}: expected a readable file, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"read_json: {path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"read_json: {path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_finetune(
    folder: str | os.PathLike,
    model: str | os.PathLike,
    text: Iterable[str | os.PathLike],
    control: bool,
    start: str = "none",
    calibration: Mapping[str, int] | None = None,
) -> None:
    """Writes finetune.json, and the folder when there is none. Paths become absolute."""
    from . import __version__

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"finetune: {folder}: expected a folder, got {error.strerror}") from error
    entry = {
        "libqat": __version__,
        "model": os.path.abspath(model),
        "text": [os.path.abspath(path) for path in text],
        "control": control,
        "start": start,
        "calibration": dict(calibration or {}),
    }
    write_json(folder / FINETUNE, entry)


def read_finetune(folder: str | os.PathLike) -> dict[str, Any]:
    """finetune.json of a run folder, see FINETUNE. FileError naming what is missing or of another type."""
    path = Path(folder) / FINETUNE
    found = read_json(path)
    found.setdefault("calibration", {})  # runs of before have none
    kinds = {"libqat": str, "model": str, "text": list, "control": bool, "calibration": dict}
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind):
            raise FileError(f"read_finetune: {path}: {key}: expected {kind.__name__}, got {found.get(key)!r}")
    return found


def read_policy(folder: str | os.PathLike) -> dict[str, Any]:
    """The policy of a run, from its run.json."""
    path = Path(folder) / RUN
    policy = read_json(path).get("policy")
    if not isinstance(policy, dict):
        raise FileError(f"read_policy: {path}: policy: expected an object, got {policy!r:.80}")
    return policy


def new_evaluation() -> dict[str, Any]:
    """An evaluation document without entries."""
    return {"format": _FORMAT, **{key: [] for key in _NAMED}}


def read_evaluation(folder: str | os.PathLike) -> dict[str, Any]:
    """evaluation.json of a run folder: {"format": 1, "models", "texts", "choices", "metrics"}, all lists.

    Entries are dicts with a name (`row` of a model, `name` of the others). FileError when the file is missing
    or has another layout.
    """
    path = Path(folder) / EVALUATION
    found = read_json(path)
    if found.get("format") != _FORMAT:
        raise FileError(f"read_evaluation: {path}: format: expected {_FORMAT}, got {found.get('format')!r}")
    for key, name in _NAMED.items():
        entries = found.get(key)
        if not isinstance(entries, list):
            raise FileError(f"read_evaluation: {path}: {key}: expected a list, got {type(entries).__name__}")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                raise FileError(f"read_evaluation: {path}: {key}[{index}].{name}: expected a name")
    return found


def merge_evaluation(folder: str | os.PathLike, found: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the entries of `found` into the folder's evaluation.json and returns the whole document.

    An entry replaces the earlier one of its name; others stay. When the checkpoint is not the one that was
    evaluated before (its SHA-256 is recorded as `"checkpoint"`), everything earlier is dropped.
    """
    folder = Path(folder)
    fingerprint = _sha256(folder / CHECKPOINT)
    earlier = read_evaluation(folder) if (folder / EVALUATION).exists() else new_evaluation()
    if earlier.get("checkpoint", fingerprint) != fingerprint:
        earlier = new_evaluation()
    merged = new_evaluation() | {"checkpoint": fingerprint}
    for key, name in _NAMED.items():
        entries = {entry[name]: entry for entry in [*earlier[key], *found.get(key, [])]}
        merged[key] = list(entries.values())
    write_json(folder / EVALUATION, merged)
    return merged


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise FileError(f"evaluation: {path}: expected the run's checkpoint, got {error.strerror}") from error
    return digest.hexdigest()
