"""Loads LibTorch and then the extension, or says why the two do not fit together.

LibTorch promises no binary compatibility between versions, and two builds of libqat in one process would
register their operators twice.
"""

from pathlib import Path

import torch

from ._build import torch_version, version

_LIBRARY = "libqat.so"


def loaded_libraries() -> list[str]:
    """The files named libqat.so that this process has mapped. One, once libqat is imported."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # a system without /proc
        return []
    fields = [line.split(maxsplit=5) for line in maps.splitlines()]
    return sorted({f[5] for f in fields if len(f) == 6 and Path(f[5]).name == _LIBRARY})


def check_torch(found: str) -> None:
    """ImportError for another torch than the one built with ('+cpu' and the like aside)."""
    if found.split("+")[0] != torch_version:
        raise ImportError(
            f"libqat {version} was built with torch {torch_version}, but torch {found} is installed. "
            f"Run `pip install torch=={torch_version}`, or build libqat from source against torch {found}."
        )


def check_extension() -> None:
    """Imports the extension; ImportError when it finds another build's library.

    The dynamic loader gives the extension a libqat.so that the process has loaded already, if there is one.
    """
    before = loaded_libraries()
    reason = "libqat: the package and its library are of different builds: install libqat again"
    if before:
        reason = (
            f"libqat {version}: this process has loaded {before[0]}, which is of another build. "
            "A program that embeds Python must link the package's own library, which CMake finds by "
            "CMAKE_PREFIX_PATH = libqat.cmake_prefix_path"
        )
    try:
        from . import _core
    except ImportError as error:
        if before:
            raise ImportError(reason) from error
        raise
    if _core.__version__ != version:
        raise ImportError(reason)


check_torch(torch.__version__)
check_extension()
