"""Multiple-choice questions: reading them, and cutting them into tokens as lm-evaluation-harness does."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._core import ArgumentError, FileError, UnsupportedError

Continuation = tuple[list[int], int]
"""(tokens, context): the first `context` tokens are given, the others are scored."""


@dataclass(frozen=True)
class Question:
    """One question with its choices."""

    question: str
    """What stands before the choice, as the model reads it: few-shot examples and "Answer:" included."""
    choices: tuple[str, ...]
    """Two or more."""
    answer: int
    """Index of the right choice, from 0."""
    id: str = ""
    delimiter: str = " "
    """Between question and choice, where neither has whitespace of its own."""

    def texts(self) -> list[tuple[str, str]]:
        """(context, continuation) of each choice; their sum is what the model reads."""
        return [(self.question, self._joint(choice) + choice) for choice in self.choices]

    def _joint(self, choice: str) -> str:
        return "" if self.question[-1].isspace() or choice[0].isspace() else self.delimiter


def question_of(entry: Mapping[str, Any], subject: str = "question") -> Question:
    """A Question of a dict with the keys of a file's line, see `read_choices`.

    ArgumentError naming `subject` and the key that is missing or of another kind.
    """

    def fail(key: str, expected: str) -> None:
        raise ArgumentError(f"{subject}: {key}: expected {expected}, got {entry.get(key)!r:.80}")

    question, choices, answer = entry.get("question"), entry.get("choices"), entry.get("answer")
    context, delimiter = entry.get("context", ""), entry.get("delimiter", " ")
    if not isinstance(context, str):
        fail("context", "text")
    if not isinstance(delimiter, str):
        fail("delimiter", "text")
    if not isinstance(question, str) or not question.strip():
        fail("question", "text")
    if not isinstance(choices, (list, tuple)) or len(choices) < 2:
        fail("choices", "a list of two or more texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        fail("choices", "a list of two or more texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        fail("answer", f"the index of a choice, 0 to {len(choices) - 1}")
    whole = f"{context}\n\n{question}" if context else question
    return Question(whole, tuple(choices), answer, str(entry.get("id", "")), delimiter)


def read_choices(path: str | os.PathLike) -> list[Question]:
    """The questions of a JSON Lines file, one object a line:

        {"question": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}

    question: what the model reads before the choice. choices: two or more texts. answer: index of the right
    one, from 0. Optional: "context", put before the question with a blank line between (a passage, examples);
    "id"; "delimiter", by default one space, put between question and choice unless one of them brings
    whitespace. Other keys are ignored, so that data sets with more columns work as they are.

    FileError naming the file and the line for anything else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FileError(f"read_choices: {path}: expected UTF-8 text, got {error.reason}") from error
    except OSError as error:
        raise FileError(f"read_choices: {path}: expected a readable file, got {error.strerror}") from error
    questions = [
        _parse(line, f"read_choices: {path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not questions:
        raise FileError(f"read_choices: {path}: expected questions, got an empty file")
    return questions


def _parse(line: str, subject: str) -> Question:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{subject}: expected a JSON object, got {error}") from error
    if not isinstance(entry, dict):
        raise FileError(f"{subject}: expected a JSON object, got {type(entry).__name__}")
    try:
        return question_of(entry, subject)
    except ArgumentError as error:
        raise FileError(str(error)) from error


def encode(tokenizer: Any, pairs: Iterable[tuple[str, str]]) -> list[Continuation]:
    """(context, continuation) texts as token ids.

    Both are tokenized as one text, and the context's own number of tokens is where the continuation begins;
    whitespace at the end of the context belongs to the continuation. No special tokens are added.
    tokenizer: a `tokenizers.Tokenizer` or a Hugging Face fast tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "encode_batch"):
        raise UnsupportedError(f"choices: expected a tokenizers.Tokenizer, got {type(tokenizer).__name__}")
    contexts, wholes = [], []
    for context, continuation in pairs:
        contexts.append(context.rstrip())
        wholes.append(context + continuation)
    heads = backend.encode_batch(contexts, add_special_tokens=False)
    bodies = backend.encode_batch(wholes, add_special_tokens=False)
    # Where a token spans the joint and the whole is no longer than the context, the last token is scored.
    return [
        (body.ids, min(len(head.ids), len(body.ids) - 1)) for head, body in zip(heads, bodies, strict=True)
    ]


def _begun(beginning: int, ids: list[int], context: int, max_length: int) -> Continuation:
    dropped = min(context, max(0, len(ids) - max_length))
    return [beginning, *ids[dropped:]], context - dropped + 1


def encode_questions(
    tokenizer: Any, questions: Iterable[Question], beginning: int | None = None, max_length: int = 2048
) -> list[tuple[list[Continuation], list[int], int]]:
    """(choices, bytes, answer) of each question, as `libqat.score_choices` takes them.

    beginning: token to put before each question; one that is longer than `max_length` with it loses its own
    first tokens here, as `score_choices` would take this one away.
    """
    questions = list(questions)
    encoded = encode(tokenizer, [pair for question in questions for pair in question.texts()])
    if beginning is not None:
        encoded = [_begun(beginning, ids, context, max_length) for ids, context in encoded]
    flat = iter(encoded)
    return [
        (
            [next(flat) for _ in question.choices],
            [len(choice.encode()) for choice in question.choices],
            question.answer,
        )
        for question in questions
    ]
