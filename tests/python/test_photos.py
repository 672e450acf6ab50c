"""The Debian package is stood in for by small .deb files made here: an ar archive with a data.tar.xz."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from libqat import FileError, photos

ROOT = "./usr/share/tuxpaint/stamps/"


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


def ar_of(members):
    result = b"!<arch>\n"
    for name, content in members:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        result += header.encode() + content + b"\n" * (len(content) % 2)
    return result


def deb_of(files):
    return ar_of([("debian-binary", b"2.0"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar_of(files))])


PICTURES = {
    ROOT + "animals/birds/owl.png": b"owl",
    ROOT + "food/pear.png": b"pear",
    ROOT + "food/pear.txt": b"a pear",
    ROOT + "symbols/alphabets/a.png": b"a",
    ROOT + "food/../../../../evil.png": b"evil",
    ROOT + "food/link.png": None,
    "./usr/share/other/x.png": b"x",
}


@pytest.fixture
def deb(tmp_path):
    path = tmp_path / "made.deb"
    path.write_bytes(deb_of(PICTURES))
    return path


def names(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_unpacks_the_wanted_pictures_only(tmp_path, deb):
    photos.unpack(deb, tmp_path / "out")
    assert names(tmp_path / "out") == {"animals/birds/owl.png": b"owl", "food/pear.png": b"pear"}


def test_keeps_what_has_the_pinned_digest(tmp_path, deb, monkeypatch):
    photos.unpack(deb, tmp_path / "out")
    monkeypatch.setattr(photos, "DIGEST", photos.digest(tmp_path / "out"))
    cache = tmp_path / "cache"
    folder = photos.stamps(deb, cache)
    assert [path.name for path in cache.iterdir()] == [folder.name]
    deb.unlink()
    assert photos.stamps(deb, cache) == folder  # found in the cache, so the package is not opened again

    (folder / "food" / "pear.png").write_bytes(b"apple")
    deb.write_bytes(deb_of(PICTURES))
    assert names(photos.stamps(deb, cache))["food/pear.png"] == b"pear"


def test_refuses_other_pictures(tmp_path, deb):
    with pytest.raises(FileError, match=r"made\.deb: expected the pictures of tuxpaint"):
        photos.stamps(deb, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_digest_sees_names_and_contents(tmp_path):
    digests = set()
    for files in ({"a": b"1", "b": b"2"}, {"a": b"2", "b": b"1"}, {"a": b"1", "c": b"2"}, {"a": b"1"}):
        folder = tmp_path / str(len(digests))
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        digests.add(photos.digest(folder))
    assert len(digests) == 4


BROKEN = {
    "empty": (b"", "no ar archive"),
    "other": (b"PK\x03\x04" + b"\0" * 100, "no ar archive"),
    "no data": (ar_of([("debian-binary", b"2.0")]), r"data\.tar\.xz, got none"),
    "bad header": (b"!<arch>\n" + b"x" * 60, "ar header at byte 8"),
    "bad length": (ar_of([("a", b"")]).replace(b"0         `", b"-1        `"), "ar header"),
    "cut": (deb_of(PICTURES)[:-300], "readable Debian package"),
    "no tar": (ar_of([("data.tar.xz", b"not xz at all")]), "readable Debian package"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refuses_broken_packages(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / "broken.deb"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        photos.unpack(path, tmp_path / "out")


def test_refuses_pictures_of_absurd_size(tmp_path, monkeypatch, deb):
    monkeypatch.setattr(photos, "_LARGEST", 3)
    with pytest.raises(FileError, match=r"pear\.png: expected at most 3 bytes, got 4"):
        photos.unpack(deb, tmp_path / "out")


def test_names_a_missing_package(tmp_path):
    with pytest.raises(FileError, match=r"absent\.deb"):
        photos.photos(tmp_path / "absent.deb", tmp_path / "cache")


@pytest.mark.parametrize("failure", ["no apt-get", "no such package"])
def test_says_what_to_do_without_apt(tmp_path, monkeypatch, failure):
    def run(command, **_):
        if failure == "no apt-get":
            raise FileNotFoundError(2, "No such file or directory")
        return subprocess.CompletedProcess(command, 100)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FileError, match="folder with some hundred photos of your own"):
        photos.photos(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_third_photo_of_a_folder_is_held_out(tmp_path):
    for name in ("b/3.PNG", "a/1.jpg", "a/2.webp", "a/cartoon/x.png", "b/4.jpeg", "c.bmp", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    training, held_out = photos.photos(tmp_path)
    assert [path.name for path in held_out] == ["x.png", "c.bmp"]
    assert [path.name for path in training] == ["1.jpg", "2.webp", "3.PNG", "4.jpeg"]


def test_drawings_of_the_package_are_not_held_out(tmp_path, monkeypatch):
    folder = tmp_path / "stamps"
    for name in ("a/1.png", "a/2.png", "a/cartoon/2b.png", "a/3.png", "clothes/4.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.setattr(photos, "stamps", lambda deb, cache: folder)
    training, held_out = photos.photos(None)
    assert [path.name for path in held_out] == ["3.png"]
    assert [path.name for path in training] == ["1.png", "2.png", "2b.png", "4.png"]


def test_a_folder_needs_three_photos(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(FileError, match="expected at least 3 images"):
        photos.photos(tmp_path)
