"""The tokenizer of a GGUF as the files of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import processors

from . import _core
from .tokenizer import load_tokenizer

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def write_tokenizer_files(source: Path, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and the chat templates.

    source: a GGUF of a kind that `load_tokenizer` knows. Its UnsupportedError and FileError pass through.
    """
    keys = _core.read_gguf_header(source, full=True)["metadata"]
    tokens = keys.get("tokenizer.ggml.tokens", [])
    ids = {role: keys.get(f"tokenizer.ggml.{name}_token_id") for role, name in _ROLES.items()}
    named = {role: tokens[i] for role, i in ids.items() if isinstance(i, int) and i < len(tokens)}
    tokenizer = load_tokenizer(source)
    add_bos = bool(keys.get("tokenizer.ggml.add_bos_token")) and "bos" in named
    if add_bos:
        bos = named["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids["bos"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": token for role, token in named.items()}
    context = keys.get(f"{keys.get('general.architecture')}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(keys, ids))
    _write_templates(keys, folder)


def _generation_config(keys: dict[str, Any], ids: dict[str, int | None]) -> dict[str, Any]:
    ends = [ids["eos"], *(keys.get(f"tokenizer.ggml.{end}_token_id") for end in ("eot", "eom"))]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    config: dict[str, Any] = {"bos_token_id": ids["bos"], "pad_token_id": ids["pad"]}
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    sampling = {name: keys.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    sampling = {name: _shortest(value) for name, value in sampling.items() if value is not None}
    if sampling:
        config |= {"do_sample": True} | sampling
    return {key: value for key, value in config.items() if value is not None}


def _shortest(value: float) -> float:
    """0.6 for the float32 beside it."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _write_templates(keys: dict[str, Any], folder: Path) -> None:
    key = "tokenizer.chat_template"
    if isinstance(template := keys.get(key), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    names = [name for name in keys.get(f"{key}s", []) if isinstance(keys.get(f"{key}.{name}"), str)]
    names = [name for name in names if name.replace("_", "").isalnum()]
    more = folder / "additional_chat_templates"
    for name in names:
        more.mkdir(exist_ok=True)
        (more / f"{name}.jinja").write_text(keys[f"{key}.{name}"], encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
