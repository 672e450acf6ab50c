"""The include-direction test: every `#include "qat/..."` obeys the table of docs/architecture.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "libqat"

# folder: the folders whose headers it may include, besides its own.
ALLOWED = {
    "core": set(),
    "arch": {"core"},
    "grid": {"core"},
    "policy": {"core", "grid", "arch"},
    "io": {"core"},
    "ops": {"core", "grid"},
    "quantizer": {"core", "ops", "grid"},
    "nn": {"core", "ops", "quantizer"},
    "checkpoint": {"core", "ops", "io", "grid"},
    "eval": {"core", "ops"},
    "prepare": {"core", "policy", "io", "ops", "quantizer", "nn", "checkpoint", "grid"},
    "ptq": {"core", "grid", "ops", "quantizer", "prepare"},
    "train": {"core", "grid", "ops", "quantizer", "prepare", "eval", "io", "checkpoint", "policy"},
    "export": {"core", "arch", "grid", "ops", "checkpoint", "io"},
    "models": {"core", "arch", "grid", "ops", "quantizer", "nn", "checkpoint", "io", "export"},
}
LEAN = ["core", "arch", "grid", "policy", "io", "ops", "quantizer", "checkpoint", "eval"]
NO_TORCH = ["core", "arch", "grid", "policy", "io"]

# Headers of no folder: all of the library at once, and its version.
ABOVE_ALL = {"qat.hpp", "version.hpp"}
FILES = sorted(p for p in ROOT.rglob("*") if p.suffix in {".hpp", ".cpp"})


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[2] if parts[0] == "include" else parts[1]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#include [<"]([^">]+)[">]', path.read_text(), re.M)


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_includes_only_what_lies_below_it(folder):
    wrong = []
    for path in FILES:
        if path.name in ABOVE_ALL or folder_of(path) != folder:
            continue
        for name in includes(path):
            match = re.match(r"qat/([a-z]+)/", name)
            if match and match[1] != folder and match[1] not in ALLOWED[folder]:
                wrong.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_in_the_table():
    assert {folder_of(p) for p in FILES if p.name not in ABOVE_ALL} == set(ALLOWED)


def test_nothing_includes_the_whole_of_torch():
    assert not [str(p) for p in FILES if "torch/torch.h" in includes(p)]


def test_public_headers_stay_lean():
    heavy = re.compile(r"(torch|nlohmann|Eigen|pybind11|ATen|c10)/")
    wrong = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in FILES
        if path.suffix == ".hpp" and path.is_relative_to(ROOT / "include") and path.name not in ABOVE_ALL
        for name in includes(path)
        if folder_of(path) in LEAN and heavy.match(name) and name != "ATen/core/Tensor.h"
    ]
    assert not wrong, "\n".join(wrong)


def test_folders_without_torch_never_include_it():
    wrong = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in FILES
        if folder_of(path) in NO_TORCH
        for name in includes(path)
        if re.match(r"(torch|ATen|c10)/", name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_never_names_models():
    wrong = [
        str(p) for p in FILES if folder_of(p) != "models" for n in includes(p) if n.startswith("qat/models/")
    ]
    assert not wrong, "\n".join(wrong)
