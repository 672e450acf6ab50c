"""Published model configurations by name: enough to ask for sizes and memory without a download."""

import os
from pathlib import Path

from ._core import ArgumentError, FileError

_FOLDER = Path(__file__).parent / "model_configs"


def model_config_names() -> list[str]:
    """The names that `model_config` knows: "gemma-4-e2b", "qwen3-8b", "smollm2-135m", ..."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def model_config(name_or_path: "str | os.PathLike") -> str:
    """The text of a config.json.

    name_or_path: one of `model_config_names()`, the path of a config.json, or of a folder that holds one. The
    published configurations are those of the text part, with the fields that say what the model computes.

    ArgumentError that lists the names for an unknown one, FileError for a path that cannot be read.
    """
    text = os.fspath(name_or_path)
    path = Path(text)
    if os.sep not in text and not text.endswith(".json") and not path.is_dir():
        if text not in model_config_names():
            raise ArgumentError(
                "model_config: expected the path of a config.json or of a folder that holds one, or one of "
                f'{", ".join(model_config_names())}, got "{text}"'
            )
        path = _FOLDER / f"{text}.json"
    if path.is_dir():
        path = path / "config.json"
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"model_config: {path}: expected UTF-8 text, got {error.reason}") from error
    except OSError as error:
        raise FileError(f"model_config: {path}: expected a readable file, got {error.strerror}") from error


__all__ = ["model_config", "model_config_names"]
