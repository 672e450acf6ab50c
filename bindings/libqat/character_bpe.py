"""SentencePiece-style vocabularies of GGUF files as tokenizers that cut text where llama.cpp cuts it.

llama.cpp's rule for ``tokenizer.ggml.model = llama`` (src/llama-vocab.cpp): of all neighbouring pieces that
make a token together, join those whose token has the highest score, the leftmost of equals, until none is
left; a character that is no token becomes its bytes ``<0x..>``. BPE joins the pair of the lowest rank, the
leftmost of equals. So the merges are all ways to split a token in two, ordered by the score of the token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from ._core import FileError, UnsupportedError

SPACE = "▁"
MODELS = ("llama", "gemma4")
"""Values of tokenizer.ggml.model that are read here: by scores, and by merges over whole lines."""


def character_bpe(keys: Mapping[str, Any], path: Path, added: frozenset[str]) -> Tokenizer:
    """The tokenizer of a GGUF whose `tokenizer.ggml.model` is one of `MODELS`, without its added tokens.

    Args:
        keys: the metadata; tokens, and scores or merges.
        path: the file, for messages.
        added: tokens that are cut out of a text before anything else, and so are never made of pieces.

    Raises:
        FileError: scores that do not fit the tokens, or merges of things that are no tokens.
        UnsupportedError: scores that no order of merges stands for.
    """
    tokens = keys["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    by_scores = keys["tokenizer.ggml.model"] == "llama"
    if by_scores:
        merges = _merges_by_score(vocabulary, _scores(keys, len(tokens), path), added, path)
    else:
        merges = _merges_within_lines(keys, path)
    unknown = keys.get("tokenizer.ggml.unknown_token_id")
    has_unknown = isinstance(unknown, int) and unknown < len(tokens)
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=tokens[unknown] if has_unknown else None,
        )
    except Exception as error:  # the package raises the bare Exception
        raise FileError(f"load_tokenizer: {path}: tokenizer.ggml.merges: {error}") from error
    tokenizer = Tokenizer(model)
    prefixes = by_scores and keys.get("tokenizer.ggml.add_space_prefix", True)  # llama.cpp's own default
    _set_spaces(tokenizer, prefixes)
    return tokenizer


def _set_spaces(tokenizer: Tokenizer, prefixes: bool) -> None:
    """Spaces become "▁" and back; `prefixes` puts one before every text between added tokens."""
    replace = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixes:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        back.append(decoders.Strip(" ", left=1, right=0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(back)


def _scores(keys: Mapping[str, Any], count: int, path: Path) -> list[float]:
    scores = keys.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != count or any(map(math.isnan, scores)):
        got = f"{len(scores)} values" if isinstance(scores, list) else repr(scores)
        raise FileError(
            f"load_tokenizer: {path}: tokenizer.ggml.scores: expected a number for each of the {count} "
            f"tokens, got {got}"
        )
    return scores


def _merges_by_score(
    vocabulary: Mapping[str, int], scores: Sequence[float], added: frozenset[str], path: Path
) -> list[tuple[str, str]]:
    made = [
        (token, ways) for token in vocabulary if token not in added and (ways := _ways(token, vocabulary))
    ]
    made.sort(key=lambda item: -scores[vocabulary[item[0]]])
    for (first, _), (second, _) in pairwise(made):
        if scores[vocabulary[first]] == scores[vocabulary[second]]:
            raise UnsupportedError(
                f"load_tokenizer: {path}: tokenizer.ggml.scores: expected different scores of tokens that "
                f"are made of others, got {scores[vocabulary[first]]:g} for {first!r} and {second!r}"
            )
    return [(token[:i], token[i:]) for token, ways in made for i in ways]


def _ways(token: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Where `token` can be split into two tokens, the way that goes first first.

    Where two ways compete for a piece, as (ab, a) and (a, ba) do in ab|a|ba, llama.cpp takes the left one.
    That one splits after a period of the token, so periods go first; when both do (a|aa and aa|a), the long
    left piece is the one that joining from the left leaves behind.
    """
    ways = [i for i in range(1, len(token)) if token[:i] in vocabulary and token[i:] in vocabulary]
    return sorted(ways, key=lambda i: (not token.startswith(token[i:]), -i))


def _merges_within_lines(keys: Mapping[str, Any], path: Path) -> list[tuple[str, ...]]:
    """llama.cpp cuts before and after line ends first; merges that never reach across need no such step."""
    merges = keys.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise FileError(f"load_tokenizer: {path}: tokenizer.ggml.merges: expected a list, got {merges!r:.80}")
    for merge in merges:
        if "\n" in merge and merge.strip("\n ") != "":
            raise UnsupportedError(
                f"load_tokenizer: {path}: tokenizer.ggml.merges: expected no token with a line end and "
                f"something else, got {merge!r}"
            )
    return [tuple(merge.split(" ", 1)) for merge in merges]
