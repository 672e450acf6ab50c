"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ._core import FileError


def replace_file(path: str | os.PathLike, content: bytes, function: str) -> Path:
    """Writes a file by renaming a finished one. FileError, in the name of `function`, naming the path."""
    with new_file(path, function) as temporary:
        temporary.write_bytes(content)
    return Path(path)


@contextlib.contextmanager
def new_file(path: str | os.PathLike, function: str) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends well.

    FileError, in the name of `function`, naming the path.
    """
    path, temporary = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            temporary = Path(file.name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"{function}: {path}: expected a writable file, got {error.strerror}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
