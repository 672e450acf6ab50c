"""The wheel, made of the objects that `make build` compiled, in an environment that has nothing else.

The environment is build/wheel-venv. It is kept, for the sake of torch's size; libqat is installed afresh.
"""

import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import libqat

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja lie beside python
TORCH = torch.__version__.split("+")[0]

pytestmark = pytest.mark.skipif(
    not (BUILD / "CMakeCache.txt").exists(), reason="there is no build/ to make a wheel from"
)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**clean, "PATH": TOOLS, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def documented(start: str) -> list[str]:
    """The lines of a shell block of docs/install.md, from the line that begins with `start`."""
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) if f"\n{start}" in f"\n{b}"]
    lines = block.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith(start)) :]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = shlex.split(documented("pip wheel")[0])
    command[command.index("dist")] = str(folder)
    run(sys.executable, "-m", *command, "--disable-pip-version-check", cwd=ROOT)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel) -> Path:
    """bin/ of a fresh environment with torch, the wheel and what the wheel asks for."""
    folder = BUILD / "wheel-venv"
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "uninstall", "-q", "-y", "libqat")
    run(*pip, "install", "-q", f"torch=={TORCH}")
    run(*pip, "install", "-q", wheel)
    return folder / "bin"


def test_the_wheel_holds_library_headers_cmake_package_and_types(wheel):
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"libqat-{libqat.__version__}-{version}-{version}-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        texts = {
            n: archive.read(n).decode() for n in names if n.endswith((".cmake", ".py", ".hpp", "METADATA"))
        }
    headers = [path.relative_to(ROOT / "libqat") for path in (ROOT / "libqat/include").rglob("*.hpp")]
    expected = {
        "lib/libqat.so",
        "lib/libqat_models.so",
        "py.typed",
        "_core.pyi",
        "_build.py",
        "cli/__init__.py",
    }
    expected |= {
        f"share/cmake/qat/qat{part}.cmake" for part in ("Config", "ConfigVersion", "Targets", "Torch")
    }
    expected |= {str(header) for header in headers}
    package = ROOT / "bindings" / "libqat"
    sources = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected |= {str(path.relative_to(package)) for path in sources if path.suffix != ".so"}
    assert {f"libqat/{name}" for name in expected} <= names
    assert sum(name.endswith(".so") for name in names) == 3
    for name, text in texts.items():
        assert str(ROOT) not in text, name
        assert sys.prefix not in text, name


def test_the_libraries_look_for_each_other_beside_themselves_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        libraries = [n for n in archive.namelist() if n.endswith(".so")]
        archive.extractall(tmp_path, libraries)
    for name in libraries:
        paths = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", run("readelf", "-d", tmp_path / name))
        assert paths == ["$ORIGIN/lib" if "_core" in name else "$ORIGIN"], name


def test_a_fresh_environment_trains_and_saves(environment, tmp_path):
    code = (
        "import libqat, torch\n"
        "net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))\n"
        "prepared = libqat.prepare(net, 'int4-channel')\n"
        "net(torch.randn(8, 64)).square().mean().backward()\n"
        "libqat.save(libqat.freeze(prepared), 'net.qat.safetensors')\n"
        "shipped = libqat.load('net.qat.safetensors').weight('0.weight')\n"
        "assert shipped.shape == (32, 64)\n"
        "print(libqat.__file__, *libqat._loading.loaded_libraries())\n"
    )
    package, library = run(environment / "python", "-c", code, cwd=tmp_path).split()
    assert Path(package).is_relative_to(environment.parent)
    assert Path(library) == Path(package).parent / "lib" / "libqat.so"


def test_the_console_script_runs(environment, tmp_path):
    versions = run(environment / "libqat", "--version")
    assert versions.startswith(f"libqat {libqat.__version__} (torch {TORCH}")
    assert "finetune" in run(environment / "libqat", "--help")


def test_a_cpp_program_finds_the_library_of_the_wheel_and_its_torch(environment, tmp_path):
    headers = run(environment / "python", "-c", "import libqat; print(*libqat.include_paths())", cwd=tmp_path)
    assert Path(headers.strip(), "qat", "qat.hpp").exists()
    (tmp_path / "my-project").symlink_to(ROOT / "tests" / "consumers" / "find_package")
    (tmp_path / "program.cpp").symlink_to(ROOT / "tests" / "consumers" / "program.cpp")
    script = "\n".join(
        ["set -e", f"PATH={environment}:$PATH", "mkdir built", *documented("cmake -S my-project")]
    )
    run("bash", "-c", script.replace("my-project/build", "built"), cwd=tmp_path)
    cache = (tmp_path / "built" / "CMakeCache.txt").read_text()
    found = re.search(r"^Torch_DIR:PATH=(.*)$", cache, re.M)
    assert found
    assert Path(found[1]).is_relative_to(environment.parent)
    assert "at 4 bits, the same from" in run(tmp_path / "built" / "consumer", cwd=tmp_path)
