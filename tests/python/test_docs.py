"""Every snippet of the README and of docs/ does what it says.

python blocks run, in order and in one namespace per document, in a folder that holds `my-model` (a tiny
Hugging Face folder), `my-text.txt`, `my-policy.json`, `my-questions.jsonl` and `my_metric.py`; console blocks
run their `$ libqat ...` lines there; json blocks are policies; cpp and cmake blocks stand word for word in a
program or project that ctest builds and runs; the sh blocks of install.md are run by test_wheel.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import libqat

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(document: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(document.read_text(encoding="utf-8")) if name == language]


def with_blocks(language: str):
    chosen = [d for d in DOCUMENTS if blocks(d, language)]
    return pytest.mark.parametrize("document", chosen, ids=lambda d: str(d.relative_to(ROOT)))


@pytest.fixture
def user_folder(tmp_path, hf_folder, text_file, monkeypatch):
    shutil.copytree(hf_folder, tmp_path / "my-model")
    shutil.copy(text_file, tmp_path / "my-text.txt")
    (tmp_path / "my-policy.json").write_text(blocks(ROOT / "docs" / "policy.md", "json")[0], encoding="utf-8")
    evaluate = ROOT / "docs" / "evaluate.md"
    (tmp_path / "my-questions.jsonl").write_text(blocks(evaluate, "jsonl")[0], encoding="utf-8")
    (tmp_path / "my_metric.py").write_text(blocks(evaluate, "python")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@with_blocks("python")
def test_python_snippets_run(document, user_folder):
    namespace = {"libqat": libqat}
    for index, body in enumerate(blocks(document, "python")):
        exec(compile(body, f"{document.name}[{index}]", "exec"), namespace)


@with_blocks("console")
def test_console_snippets_run(document, user_folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    for body in blocks(document, "console"):
        commands = re.findall(r"^\$ libqat (.*)$", body, re.M)
        assert commands, f"{document.name}: a console block without a libqat command"
        for command in commands:
            done = subprocess.run(
                [sys.executable, "-m", "libqat", *command.split()],
                capture_output=True,
                text=True,
                env=environment,
            )
            assert done.returncode == 0, f"libqat {command}\n{done.stdout}\n{done.stderr}"


@with_blocks("json")
def test_json_snippets_are_policies(document):
    for body in blocks(document, "json"):
        policy = libqat.Policy.from_json(body)
        assert len(
            policy.rules if hasattr(policy, "rules") else json.loads(policy.to_json())["rules"]
        ) == len(json.loads(body)["rules"])


@with_blocks("cpp")
def test_cpp_snippets_are_compiled_somewhere(document):
    def squeeze(text: str) -> str:
        return re.sub(r"\s+", " ", text).strip()

    programs = [path for folder in ("examples", "tests") for path in (ROOT / folder).rglob("*.cpp")]
    compiled = [squeeze(path.read_text(encoding="utf-8")) for path in programs]
    for body in blocks(document, "cpp"):
        assert any(squeeze(body) in text for text in compiled), body


@with_blocks("cmake")
def test_cmake_snippets_are_configured_somewhere(document):
    projects = [
        path.read_text(encoding="utf-8") for path in (ROOT / "tests/consumers").rglob("CMakeLists.txt")
    ]
    for body in blocks(document, "cmake"):
        assert any(body in text for text in projects), body


def test_links_inside_the_repository_lead_somewhere():
    broken = []
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)
