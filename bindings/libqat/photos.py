"""Photos for vision models: a folder of the user's own, or the cut-out photos of a Debian package.

No Python package carries photos in useful number under a free licence, so the default is Debian's
tuxpaint-stamps-default (GPL-2, 161 MB): about 440 photographed and drawn objects on transparent ground.
"""

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ._core import FileError
from .packages import cache_folder

PACKAGE = "tuxpaint-stamps-default"
VERSION = "2022.06.04-1"
FOLDER = f"stamps-{VERSION}"
"""Name of the unpacked folder in the cache."""
DIGEST = "08b1ade7b939dd2b09e8464f76606493d872819817449d87f6d8b4fbf84edfea"
"""SHA-256 over the sorted names and the contents of the unpacked files (see `digest`)."""

_MEMBER = re.compile(r"\./usr/share/tuxpaint/stamps/((?:[\w.-]+/)+[\w.-]+\.png)")
_UNWANTED = "symbols/alphabets/"
_LARGEST = 16 << 20
"""Bytes of one picture, above which the archive is not what it should be."""
_DRAWN = re.compile("cartoon/|symbols/|clothes/|seasonal/(easter|hanukkah|halloween)/|flags/")
HELD_OUT_EVERY = 3
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}

HELP = (
    f"name a folder with some hundred photos of your own, or the file {PACKAGE}_{VERSION}_all.deb of Debian "
    "12, which any computer can fetch from a Debian mirror"
)


class Photos(NamedTuple):
    """Image files for training and, none of them among those, for scoring."""

    training: list[Path]
    held_out: list[Path]


def photos(source: str | os.PathLike | None = None, cache: str | os.PathLike | None = None) -> Photos:
    """Image files in a fixed order; every third photo is held out.

    source: a folder, searched with its sub-folders; the path of the Debian package's .deb file; or None,
    which takes the package from the cache, or downloads it by apt-get (no root needed). The package's
    drawings are for training only. FileError for a folder with fewer than three images, a failed download,
    and another package than the pinned one.
    """
    own = source is not None and Path(source).is_dir()
    folder = Path(source) if own else stamps(None if source is None else Path(source), cache)
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file()]
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    paths.sort(key=names.get)
    drawn = [path for path in paths if not own and _DRAWN.search(names[path])]
    photographed = [path for path in paths if path not in set(drawn)]
    held_out = photographed[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    if not held_out:
        raise FileError(
            f"photos: {folder}: expected at least {HELD_OUT_EVERY} images "
            f"({', '.join(sorted(_SUFFIXES))}), got {len(paths)}"
        )
    return Photos([path for path in paths if path not in set(held_out)], held_out)


def stamps(deb: Path | None = None, cache: str | os.PathLike | None = None) -> Path:
    """The folder of the package's pictures in the cache, unpacked when it is absent or damaged."""
    parent = cache_folder(cache)
    folder = parent / FOLDER
    if folder.is_dir() and digest(folder) == DIGEST:
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".fetch-") as temporary:
        deb = _download(Path(temporary)) if deb is None else deb
        unpacked = Path(temporary) / "pictures"
        unpack(deb, unpacked)
        if (found := digest(unpacked)) != DIGEST:
            raise FileError(
                f"photos: {deb}: expected the pictures of {PACKAGE} {VERSION} (SHA-256 {DIGEST}), got "
                f"{found}; {HELP}"
            )
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.replace(folder)
    return folder


def digest(folder: Path) -> str:
    """SHA-256 over name, zero byte, SHA-256 of the content and line feed of each file, sorted by name."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def _download(folder: Path) -> Path:
    print(f"fetching {PACKAGE} with apt-get (161 MB)", file=sys.stderr, flush=True)
    command = ["apt-get", "download", f"{PACKAGE}={VERSION}"]
    try:
        # apt-get's own progress goes to standard error, so that standard output stays ours.
        status = subprocess.run(command, cwd=folder, stdout=2, check=False).returncode
    except OSError as error:
        raise FileError(
            f"photos: expected apt-get to fetch {PACKAGE}, got {error.strerror}; {HELP}"
        ) from error
    found = sorted(folder.glob("*.deb"))
    if status != 0 or not found:
        raise FileError(f"photos: expected apt-get to fetch {PACKAGE}, got exit code {status}; {HELP}")
    return found[0]


def unpack(deb: Path, folder: Path) -> None:
    """Writes the pictures of a .deb file, an ar archive with a data.tar.xz member, below `folder`."""
    try:
        with deb.open("rb") as file:
            size = _find_data(file, deb)
            with tarfile.open(fileobj=_Part(file, size), mode="r|xz") as tar:
                for path, content in _pictures(tar, deb):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(content)
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise FileError(f"photos: {deb}: expected a readable Debian package, got {error}") from error
    folder.mkdir(parents=True, exist_ok=True)


def _find_data(file, deb: Path) -> int:
    """Leaves `file` at the start of data.tar.xz and returns its length."""
    if file.read(8) != b"!<arch>\n":
        raise FileError(f"photos: {deb}: expected a Debian package, got no ar archive")
    while len(header := file.read(60)) == 60:
        name, length, end = header[:16].rstrip(b" /"), header[48:58].strip(), header[58:]
        if end != b"`\n" or not length.isdigit():
            raise FileError(
                f"photos: {deb}: expected an ar header at byte {file.tell() - 60}, got {header!r}"
            )
        if name == b"data.tar.xz":
            return int(length)
        file.seek(int(length) + int(length) % 2, os.SEEK_CUR)
    raise FileError(f"photos: {deb}: expected a member data.tar.xz, got none")


def _pictures(tar: tarfile.TarFile, deb: Path) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        match = _MEMBER.fullmatch(member.name)
        if match is None or not member.isreg() or match[1].startswith(_UNWANTED) or ".." in match[1]:
            continue
        if member.size > _LARGEST:
            raise FileError(
                f"photos: {deb}: {member.name}: expected at most {_LARGEST} bytes, got {member.size}"
            )
        yield match[1], tar.extractfile(member).read()


class _Part:
    """The next `size` bytes of a file, as a file."""

    def __init__(self, file, size: int):
        self._file, self._left = file, size

    def read(self, count: int) -> bytes:
        """At most `count` bytes; b"" at the end of the part."""
        content = self._file.read(min(count, self._left))
        self._left -= len(content)
        return content
