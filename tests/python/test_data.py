import bz2
import io
import tarfile

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


def test_rated_sentences_are_read_as_they_stand(tmp_path, monkeypatch):
    path = tmp_path / "h.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
            content = b'3_1\t-0.5\tA "quoted &amp; odd line.\r\n3_2\t2\tcaf\xc3\xa9\r\n'
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(data, "fetch", lambda item, cache: path)
    sentences = data.rated_sentences()
    assert list(sentences) == ["movies", "amazon", "nyt", "tweets"]
    assert sentences["nyt"] == [('A "quoted & odd line.', -0.5, "3"), ("café", 2.0, "3")]


def test_the_encoders_files_form_one_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        data, "fetch_all", lambda items, cache: [asked.append(i) or tmp_path / i.name for i in items]
    )
    assert data.minilm() == tmp_path / "all-minilm-l6-v2"
    assert {item.name.split("/")[1] for item in asked} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


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
