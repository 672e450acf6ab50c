"""The API reference builds, and nothing public is missing from it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("part", "page"), [("cpp", "namespaceqat.html"), ("python", "libqat.html")])
def test_the_reference_is_whole(part, page, tmp_path):
    command = [sys.executable, str(ROOT / "docs" / "reference.py"), part, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "freeze" in (tmp_path / part / page).read_text(encoding="utf-8")
