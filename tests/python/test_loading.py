"""One process holds one libqat.so, of the package's own build, beside the torch it was built with."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import libqat
from libqat import _build, _core, _loading

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(_loading.loaded_libraries()[0])
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_version_has_one_place():
    header = (ROOT / "libqat/include/qat/version.hpp").read_text(encoding="utf-8")
    numbers = re.findall(r"^#define QAT_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", header, re.M)
    assert libqat.__version__ == ".".join(numbers) == _core.__version__
    assert torch.__version__.split("+")[0] == _build.torch_version


def test_the_installed_package_has_the_same_version():
    if not Path(libqat.__file__).is_relative_to(ROOT / "bindings"):
        pytest.skip("runs from its build folder: no package is installed")
    assert metadata.version("libqat") == libqat.__version__


@linux
@pytest.mark.parametrize("path", ["", str(ROOT / "build" / "python")], ids=["as-it-is", "build-folder"])
def test_a_process_holds_one_library(path):
    if path and not list(Path(path).glob("libqat/_core*")):
        pytest.skip("there is no build/python")
    code = "import libqat, libqat.cli; print(*libqat._loading.loaded_libraries(), sep='\\n')"
    path = path or os.environ.get("PYTHONPATH", "")
    done = python(code, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout
    if path == str(ROOT / "build" / "python"):
        assert Path(done.stdout.strip()).is_relative_to(ROOT / "build")


@linux
def test_a_copy_that_is_loaded_already_is_shared(tmp_path):
    """As in a program that links libqat and embeds Python."""
    other = shutil.copy(LIBRARY, tmp_path / "libqat.so")
    done = python(
        f"import ctypes, torch; ctypes.CDLL({str(other)!r})\n"
        "import libqat; print(*libqat._loading.loaded_libraries()); assert 'q4_0' in libqat.grids()"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(other)


@linux
def test_another_build_that_is_loaded_already_is_named(tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text("int nothing_of_libqat() { return 0; }\n")
    other = tmp_path / "libqat.so"
    command = ["g++", "-shared", "-fPIC", "-Wl,-soname,libqat.so", str(source), "-o", str(other)]
    subprocess.run(command, check=True)
    done = python(f"import ctypes, torch; ctypes.CDLL({str(other)!r}); import libqat")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: libqat {libqat.__version__}: this process has loaded {other}"), (
        message
    )


@linux
def test_a_second_copy_says_which_files_there_are(tmp_path):
    """dlopen by path loads a copy of its own; a constructor can only end the process."""
    other = shutil.copy(LIBRARY, tmp_path / "libqat.so")
    done = python(f"import libqat, torch; torch.ops.load_library({str(other)!r})")
    assert done.returncode != 0
    expected = (
        f"libqat: {other}: expected to be the only libqat of this process, got {LIBRARY} loaded before it"
    )
    assert expected in done.stderr


def test_another_torch_is_refused_before_anything_is_loaded():
    done = python(
        "import sys, types; torch = types.ModuleType('torch'); torch.__version__ = '9.8.7+cpu'\n"
        "sys.modules['torch'] = torch; import libqat"
    )
    assert done.returncode == 1
    assert (
        f"ImportError: libqat {libqat.__version__} was built with torch {_build.torch_version}, "
        "but torch 9.8.7+cpu is installed" in done.stderr
    )


@pytest.mark.parametrize("suffix", ["", "+cpu", "+cu130"])
def test_builds_of_one_torch_version_are_the_same_to_us(suffix):
    _loading.check_torch(_build.torch_version + suffix)
