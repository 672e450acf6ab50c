"""Tokenizers from GGUF files and Hugging Face directories, giving the token ids that llama.cpp gives.

``transformers`` builds its GGUF tokenizers with rules of its own (for SmolLM2 it puts id 1 before every
text), so libqat reads the vocabulary itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from . import _core, character_bpe
from ._core import FileError, UnsupportedError

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # llama.h, llama_token_type


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file, a ``tokenizer.json``, or a directory that holds one.

    ``encode(text).ids`` adds no beginning or end token; special tokens written out in the text are
    recognised.

    Args:
        source: path. From a GGUF the byte-level BPE kinds ``gpt-2``, ``smollm``, ``llama-bpe`` and ``qwen2``
            and the SentencePiece kinds of Gemma and Llama 2 can be rebuilt; of a ``tokenizer.json``
            everything but its post-processor is kept as it is.

    Raises:
        FileError: the file is missing or malformed, or holds no tokenizer.
        UnsupportedError: a GGUF tokenizer of another kind.
    """
    path = _file(Path(source), "load_tokenizer")
    return _from_gguf(path) if _is_gguf(path) else _from_json(path)


def beginning_of_text(source: str | Path) -> int | None:
    """The token that a model's texts begin with, None for models that were trained without one.

    Gemma and Llama need it: without it they predict much worse. `source` as for `load_tokenizer`. A GGUF
    says it by `tokenizer.ggml.add_bos_token`, a folder by `add_bos_token` in its tokenizer_config.json, else
    by the post-processor of its tokenizer.json. FileError: the file is missing or malformed.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    path = _file(path, "beginning_of_text")
    if _is_gguf(path):
        keys = _core.read_gguf_header(path)["metadata"]
        adds = keys.get("tokenizer.ggml.add_bos_token", keys.get("tokenizer.ggml.model") == "llama")
        token = keys.get("tokenizer.ggml.bos_token_id")
        return token if adds and isinstance(token, int) else None
    tokenizer = _open_json(path)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if config.get("add_bos_token") is False:
        return None
    token = config.get("bos_token")
    token = tokenizer.token_to_id(token.get("content") if isinstance(token, dict) else token or "")
    first = tokenizer.encode("a").ids[:1]  # with what the post-processor puts before it
    return token if config.get("add_bos_token") or first == [token] else None


def _file(path: Path, asked: str) -> Path:
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileError(f"{asked}: expected a GGUF or a tokenizer.json, got no file at {path}")
    return path


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _open_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises the bare Exception
        raise FileError(f"load_tokenizer: {path}: expected a tokenizer.json, got {error}") from error


def _from_json(path: Path) -> Tokenizer:
    tokenizer = _open_json(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = None
    return tokenizer


def _from_gguf(path: Path) -> Tokenizer:
    keys = _core.read_gguf_header(path, full=True)["metadata"]
    kind = (_require(keys, "tokenizer.ggml.model", str, path), keys.get("tokenizer.ggml.pre", ""))
    pre_tokenizer = _pre_tokenizer(kind[1]) if kind[0] == "gpt2" else None
    by_characters = kind[0] in character_bpe.MODELS
    if pre_tokenizer is None and not by_characters:
        raise UnsupportedError(
            f"load_tokenizer: {path}: expected byte-level BPE (gpt2) of the kind gpt-2, smollm, llama-bpe or "
            f"qwen2, or a SentencePiece vocabulary (llama, gemma4), got {kind[0]} {kind[1]}".rstrip()
        )
    tokens = _require(keys, "tokenizer.ggml.tokens", list, path)
    special, visible = _added(tokens, keys.get("tokenizer.ggml.token_type", []), by_characters)
    if by_characters:
        tokenizer = character_bpe.character_bpe(keys, path, frozenset(special + visible))
    else:
        tokenizer = _byte_level_bpe(keys, tokens, kind[1], path)
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in visible])
    return tokenizer


def _byte_level_bpe(keys: dict[str, Any], tokens: list[str], pre: str, path: Path) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in _require(keys, "tokenizer.ggml.merges", list, path)]
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    except Exception as error:  # the package raises the bare Exception
        raise FileError(f"load_tokenizer: {path}: tokenizer.ggml.merges: {error}") from error
    return Tokenizer(model)


def _added(tokens: list[str], types: list[int], by_characters: bool) -> tuple[list[str], list[str]]:
    """Tokens that are found in a text before it is cut: the special ones, and those that are plain text.

    The unknown token of a byte-level vocabulary is often an ordinary one.
    """
    special = (_UNKNOWN, _CONTROL) if by_characters else (_CONTROL,)
    typed = list(zip(tokens, types, strict=False))
    return (
        [token for token, kind in typed if kind in special],
        [token for token, kind in typed if kind == _USER_DEFINED],
    )


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer | None:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        return words
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    numbers = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}.get(pre)
    if numbers is None:
        return None
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT % numbers), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _require(keys: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = keys.get(key)
    if not isinstance(value, kind):
        raise FileError(f"load_tokenizer: {path}: {key}: expected a {kind.__name__}, got {value!r:.80}")
    return value
