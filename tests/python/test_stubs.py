"""The committed types of the extension are those of the compiled one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_stubs_are_those_of_the_compiled_extension():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bindings" / "src" / "stubs.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (
        f"run `make stubs` and commit bindings/libqat/_core.pyi\n{done.stdout}{done.stderr}"
    )
