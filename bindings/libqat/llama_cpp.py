"""llama.cpp as the judge of an exported GGUF: does it load, what does it write, how does it score tokens.

Needs the package ``xllamacpp`` (a prebuilt llama.cpp). It runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ._core import ArgumentError, Error, FileError, UnsupportedError

_PACKAGE = "xllamacpp"
_WORKER = Path(__file__).with_name("_llama_cpp_worker.py")
_LOG_LINES = 8
_PATIENCE = 10.0
"""Seconds that the process may take to end."""
_CONTEXT = 512
"""Tokens that `judge` reserves at least: its prompt and what follows must fit, too."""


def available() -> bool:
    """Whether the package that brings llama.cpp is installed."""
    return importlib.util.find_spec(_PACKAGE) is not None


def version() -> str:
    """Version of the package that brings llama.cpp."""
    _require_package()
    return f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}"


class LlamaCpp:
    """A GGUF file opened by llama.cpp on the CPU. Use as a context manager, or call ``close``.

    Args:
        gguf: the file.
        threads: CPU threads.
        context: tokens of context to reserve.

    Raises:
        FileError: llama.cpp refuses the file; the message has the end of its log.
        UnsupportedError: ``xllamacpp`` is not installed.
    """

    def __init__(self, gguf: str | Path, threads: int = 2, context: int = 2048) -> None:
        _require_package()
        if not Path(gguf).is_file():
            raise FileError(f"llama_cpp: expected a GGUF file, got no file at {gguf}")
        self._gguf = str(gguf)
        self._context = context
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a debugger at every crash is slow
        )
        try:
            self._call("open", gguf=self._gguf, threads=threads, context=context)
        except BaseException:
            self.close()
            raise

    def generate(self, prompt: str | Sequence[int], n_tokens: int = 32) -> str:
        """The text that follows `prompt`, always taking the likeliest token."""
        return self._call("generate", prompt=_plain(prompt), n_tokens=n_tokens)

    def score(
        self, token_ids: Sequence[int], progress: Callable[[int, int], None] | None = None
    ) -> list[float]:
        """Log-probabilities (nats) of ``token_ids[1:]``, each given all tokens before it.

        The server returns no log-probabilities of a prompt, so every position is a request of its own for one
        forced token; what was evaluated before is reused, and a token costs about one decoding step.
        `progress` is called with positions done and in all.
        """
        tokens = _plain(token_ids)
        if not 2 <= len(tokens) <= self._context:
            raise ArgumentError(
                f"llama_cpp.score: token_ids: expected 2 to {self._context} ids (the context), "
                f"got {len(tokens)}"
            )
        return self._call("score", progress, tokens=tokens)

    def likeliest(
        self,
        token_ids: Sequence[int],
        count: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[tuple[int, float]]]:
        """After each token, the `count` likeliest next ones given all up to it: (id, log-probability).

        The likeliest comes first. `progress` is called with positions done and in all.
        """
        tokens = _plain(token_ids)
        if not 1 <= len(tokens) < self._context:
            raise ArgumentError(
                f"llama_cpp.likeliest: token_ids: expected 1 to {self._context - 1} ids (the context and the "
                f"next token), got {len(tokens)}"
            )
        if count < 1:
            raise ArgumentError(f"llama_cpp.likeliest: count: expected at least 1, got {count}")
        answer = self._call("likeliest", progress, tokens=tokens, count=count)
        return [[(int(token), value) for token, value in listed] for listed in answer]

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        `add_special` adds the tokens that the file asks for at the beginning and end.
        """
        return self._call("tokenize", text=text, add_special=add_special)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text that the file's chat template makes of `messages`: [{"role", "content"}, ...]."""
        return self._call("chat_prompt", messages=[dict(message) for message in messages])

    def chat(self, messages: Sequence[Mapping[str, str]], n_tokens: int = 32) -> str:
        """The answer to `messages` through the file's chat template, always taking the likeliest token."""
        return self._call("chat", messages=[dict(message) for message in messages], n_tokens=n_tokens)

    def close(self) -> None:
        """Ends llama.cpp's process."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # the process is gone, which is what is wanted
                pipe.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, action: str, progress: Callable[[int, int], None] | None = None, **request: Any) -> Any:
        if self._process.stdin.closed:
            raise ArgumentError(f"llama_cpp.{action}: {self._gguf}: expected an open model, got a closed one")
        try:
            message = self._ask({"action": action, **request}, progress)
        except BaseException:  # an answer may be under way, and the next one would be taken for it
            self.close()
            raise
        if message is None:
            raise self._died(action)
        if "error" in message:
            kind = FileError if action == "open" else Error
            raise kind(f"llama_cpp: {self._gguf}: {message['error']}; its log ends:\n{self._log_tail()}")
        return message["result"]

    def _ask(
        self, request: dict[str, Any], progress: Callable[[int, int], None] | None
    ) -> dict[str, Any] | None:
        """The last message of the answer, or None when the process is gone."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in self._process.stdout:
            message = json.loads(line)
            if "progress" not in message:
                return message
            if progress is not None:
                progress(*message["progress"])
        return None

    def _died(self, action: str) -> Error:
        code = self._process.wait()
        return FileError(
            f"llama_cpp: {self._gguf}: llama.cpp ended with code {code} during {action}; its log ends:\n"
            f"{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode("utf-8", "replace").splitlines()[-_LOG_LINES:])


def generate(gguf: str | Path, prompt: str | Sequence[int], n_tokens: int = 32, threads: int = 2) -> str:
    """The text that llama.cpp writes after `prompt`, always taking the likeliest token."""
    with LlamaCpp(gguf, threads) as llama:
        return llama.generate(prompt, n_tokens)


def score(
    gguf: str | Path,
    token_ids: Sequence[int],
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """llama.cpp's log-probabilities (nats) of ``token_ids[1:]``, each given all tokens before it."""
    with LlamaCpp(gguf, threads, context=max(len(token_ids) + 1, 32)) as llama:
        return llama.score(token_ids, progress)


def judge(
    gguf: str | Path,
    model: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    prompt: str,
    *,
    n_tokens: int = 32,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """llama.cpp on an exported file, beside the model that the file was made of.

    model: int64 [1, T] -> logits [1, T, V], such as the `decoder` of `libqat.open_model`. tokens: int64 [T];
    both score tokens[1:], each given all before it. progress: of llama.cpp's scoring, as in `LlamaCpp.score`.

    Returns {"version": of the package, "tokens": how many were scored, "ppl": llama.cpp's perplexity,
    "ppl_ours_same_tokens": the model's, "text": `prompt` and the `n_tokens` tokens that llama.cpp finds
    likeliest after it}. The perplexities differ a little, since llama.cpp rounds activations to 8 bits.
    """
    with torch.no_grad():
        logits = model(tokens[None])[0, :-1].float()
    ours = torch.nn.functional.cross_entropy(logits, tokens[1:]).item()
    with LlamaCpp(gguf, threads, context=max(len(tokens) + 1, _CONTEXT)) as llama:
        text = prompt + llama.generate(prompt, n_tokens)
        scores = llama.score(tokens.tolist(), progress)
    return {
        "version": version(),
        "tokens": len(scores),
        "ppl": math.exp(-sum(scores) / len(scores)),
        "ppl_ours_same_tokens": math.exp(ours),
        "text": text,
    }


def _plain(tokens: str | Sequence[int]) -> str | list[int]:
    return tokens if isinstance(tokens, str) else [int(token) for token in tokens]


def _require_package() -> None:
    if not available():
        raise UnsupportedError(
            f"llama_cpp: expected the package {_PACKAGE} (pip install {_PACKAGE}), got none"
        )
