"""Runs `libqat` for the tests of the command line."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import libqat
from libqat import cli

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": str(Path(libqat.__file__).parents[1]),
}
QUICK = ["--steps", "3", "--sequence-length", "16", "--batch-size", "2"]


def start(*arguments, **options):
    """`libqat` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "libqat", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def run(*arguments, **options):
    """Exit code, standard output and standard error; in this process unless `options` want another."""
    if options:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["libqat", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": "120"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit,
    ):
        cli.main()
    return exit.value.code, out.getvalue(), err.getvalue()


def works(*arguments, **options):
    code, out, err = run(*arguments, **options)
    assert code == 0, err
    return out


def fails(*arguments, says, **options):
    """Exit code 1, one error line that holds each of `says`, and no traceback."""
    code, out, err = run(*arguments, **options)
    assert code == 1, (out, err)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    assert "LIBQAT_DEBUG" not in err, "an error of a kind that users should never see"
    for expected in [says] if isinstance(says, str) else says:
        assert expected in errors[0], errors[0]
