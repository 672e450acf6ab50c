"""Where an installed libqat keeps what C++ programs need."""

from pathlib import Path

from . import _core

_ROOT = Path(str(_core.__file__)).resolve().parent

cmake_prefix_path: str = str(_ROOT / "share" / "cmake")
"""For CMake: `-DCMAKE_PREFIX_PATH=$(python -c 'import libqat; print(libqat.cmake_prefix_path)')` lets
`find_package(qat)` find the library of this package, and LibTorch beside it."""


def include_paths() -> list[str]:
    """The folders for `-I` in which `#include <qat/qat.hpp>` is found, LibTorch's not included (see
    `torch.utils.cpp_extension.include_paths`).

    FileError for a libqat that runs from its build folder, where no headers are installed.
    """
    folder = _ROOT / "include"
    if not (folder / "qat" / "qat.hpp").exists():
        raise _core.FileError(
            f"include_paths: {folder}: expected the headers of an installed libqat, got none"
        )
    return [str(folder)]
