"""How the programs around the library keep finished parts, and how they end."""

import pytest
from libqat.cli import program

import libqat


def test_a_finished_part_is_kept(tmp_path):
    path = tmp_path / "rows" / "a.json"
    assert program.kept(path, lambda: [{"a": 1.5}]) == [{"a": 1.5}]
    assert program.kept(path, lambda: pytest.fail("made again")) == [{"a": 1.5}]


def test_a_part_that_fails_is_not_kept(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    path = tmp_path / "rows" / "a.json"
    with pytest.raises(KeyboardInterrupt):
        program.kept(path, interrupt)
    assert program.kept(path, lambda: 2) == 2


def ended(main, **options):
    with pytest.raises(SystemExit) as found:
        program.run(main, **options)
    return found.value.code


def raising(error):
    def main():
        raise error

    return main


def test_exit_codes_and_what_is_said(capsys):
    assert ended(lambda: 1) == 1
    assert not ended(lambda: 0)
    assert not ended(lambda: None)
    assert capsys.readouterr() == ("", "")
    assert ended(raising(libqat.FileError("load: x: expected a file"))) == 1
    assert capsys.readouterr() == ("", "error: load: x: expected a file\n")
    assert ended(raising(KeyboardInterrupt)) == 130
    assert capsys.readouterr() == ("", "interrupted; the same command continues\n")
    assert ended(raising(KeyboardInterrupt), interrupted="stopped") == 130
    assert capsys.readouterr() == ("", "stopped\n")
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        program.run(lambda: 1 // 0)
