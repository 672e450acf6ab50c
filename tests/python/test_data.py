import bz2
import hashlib
import zipfile

import pytest
import torch
from conftest import make_tokenizer

from libqat import ArgumentError, FileError, UnsupportedError, data

WIKITEXT = """{{Infobox person|name=Ada {{small|nested}}}}
[[File:Ada.jpg|thumb|A [[portrait]] of Ada]]
'''Ada Lovelace''' ({{IPA|x}}; 1815) was an [[English people|English]] ''mathematician''.<ref name="a">A
reference with a [[link]].</ref> She met [[Charles Babbage]]<ref>Two</ref> in 1833.

== Work ==
{| class="wikitable"
! Year !! Event
|-
| 1843 || Notes
|}
Her notes&nbsp;contain an <b>algorithm</b>:
* for [http://example.org Bernoulli numbers]
<math>B_n</math>

==See also==
* [[Charles Babbage]]
== References ==
{{reflist}}
[[Category:Mathematicians]]
"""


def test_cleaning_keeps_the_prose_only():
    assert data.clean_wikitext(WIKITEXT) == (
        "Ada Lovelace (; 1815) was an English mathematician. She met Charles Babbage in 1833.\n\n"
        "Work\n\n"
        "Her notes contain an algorithm:\nfor Bernoulli numbers"
    )


def test_cleaning_survives_broken_markup():
    cleaned = data.clean_wikitext(
        "Plain {{unclosed text with ''odd [[quotes\n| a table's remains\nLast line."
    )
    assert cleaned.endswith("Last line.")
    assert "|" not in cleaned
    assert "''" not in cleaned
    assert data.clean_wikitext("") == ""


def dump(*texts, namespace="0"):
    pages = "".join(
        f"<page><title>t</title><ns>{namespace}</ns><revision><text>{text}</text></revision></page>"
        for text in texts
    )
    redirect = (
        '<page><ns>0</ns><redirect title="x"/><revision><text>' + "r" * 5000 + "</text></revision></page>"
    )
    talk = "<page><ns>1</ns><revision><text>" + "t" * 5000 + "</text></revision></page>"
    return f'<mediawiki xmlns="http://example.org/">{redirect}{talk}{pages}</mediawiki>'.encode()


def test_every_sixth_long_article_is_held_out(tmp_path, monkeypatch):
    texts = [f"{number} " + "a" * data.MINIMUM_CHARACTERS for number in range(13)]
    texts.insert(3, "short")
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(bz2.compress(dump(*texts)))
    monkeypatch.setattr(data, "fetch", lambda item, cache: path)
    training, held_out = data.wikipedia()
    assert [text.split()[0] for text in held_out] == ["5", "11"]
    assert [text.split()[0] for text in training] == [str(n) for n in range(13) if n not in (5, 11)]


def test_markup_is_that_of_the_training_articles_only(tmp_path, monkeypatch):
    texts = [f"[[{number}]] " + "a" * data.MINIMUM_CHARACTERS for number in range(7)]
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(bz2.compress(dump(*texts)))
    monkeypatch.setattr(data, "fetch", lambda item, cache: path)
    training, _ = data.wikipedia_articles()
    assert [article.markup for article in training] == [
        text for number, text in enumerate(texts) if number != 5
    ]


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
    return data.Item("p", "1", "p/member.bin", hashlib.sha256(b"content").hexdigest(), "kept.bin", 1)


def test_fetch_unpacks_checks_and_keeps(tmp_path, monkeypatch, item):
    monkeypatch.setattr(data, "_download", wheel_of(item, b"content"))
    path = data.fetch(item, tmp_path / "cache")
    assert path.read_bytes() == b"content"
    assert [p.name for p in path.parent.iterdir()] == ["kept.bin"]

    monkeypatch.setattr(data, "_download", lambda *_: pytest.fail("fetched although present"))
    assert data.fetch(item, tmp_path / "cache") == path


def test_fetch_replaces_a_damaged_file(tmp_path, monkeypatch, item):
    (tmp_path / "kept.bin").write_bytes(b"conten")
    monkeypatch.setattr(data, "_download", wheel_of(item, b"content"))
    assert data.fetch(item, tmp_path).read_bytes() == b"content"


def test_fetch_refuses_other_content(tmp_path, monkeypatch, item):
    monkeypatch.setattr(data, "_download", wheel_of(item, b"other"))
    with pytest.raises(FileError, match="expected SHA-256"):
        data.fetch(item, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_names_a_missing_member(tmp_path, monkeypatch, item):
    other = data.Item("p", "1", "p/elsewhere.bin", item.sha256, "kept.bin", 1)
    monkeypatch.setattr(data, "_download", lambda _, folder: wheel_of(other, b"content")(other, folder))
    with pytest.raises(FileError, match=r"made\.whl.*p/member\.bin"):
        data.fetch(item, tmp_path)


def test_cache_folder_order(monkeypatch, tmp_path):
    monkeypatch.delenv("LIBQAT_CACHE", raising=False)
    assert str(data.cache_folder()) == "out/cache"
    monkeypatch.setenv("LIBQAT_CACHE", str(tmp_path))
    assert data.cache_folder() == tmp_path
    assert str(data.cache_folder("mine")) == "mine"


def test_python_topics_are_sorted_text():
    topics = data.python_topics()
    assert len(topics) > 50
    assert topics == [topic for _, topic in sorted(__import__("pydoc_data.topics").topics.topics.items())]


def test_tokenize_joins_documents_by_a_blank_line():
    tokenizer = make_tokenizer()
    ids = data.tokenize(tokenizer, ["The first.\n", "Second"])
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids.tolist()) == "The first.\n\nSecond\n\n"
    assert torch.equal(data.tokenize(tokenizer, ["The first.\n", "Second"], limit=3), ids[:3])


def test_tokenize_refuses_what_it_cannot_read():
    with pytest.raises(ArgumentError, match="empty text"):
        data.tokenize(make_tokenizer(), [])
    with pytest.raises(UnsupportedError, match="list"):
        data.tokenize([], ["text"])


def test_read_texts_names_the_file(tmp_path):
    good, empty, binary = tmp_path / "good.txt", tmp_path / "empty.txt", tmp_path / "binary.txt"
    good.write_text("äöü", encoding="utf-8")
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert data.read_texts([good]) == ["äöü"]
    with pytest.raises(ArgumentError, match=r"empty\.txt.*empty"):
        data.read_texts([good, empty])
    with pytest.raises(FileError, match=r"binary\.txt.*UTF-8"):
        data.read_texts([binary])
    with pytest.raises(FileError, match=r"absent\.txt"):
        data.read_texts([tmp_path / "absent.txt"])
