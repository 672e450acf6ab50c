"""SentencePiece vocabularies of GGUF files: `load_tokenizer` cuts text where llama.cpp cuts it."""

import os
import random
from pathlib import Path

import gguf
import pytest
import torch
from conftest import make_llama
from exporting import TEXTS, checkpoint_of
from families import POLICY, make_family
from libqat.choices import encode_questions
from libqat.data import begin_windows
from libqat.tokenizer_files import write_tokenizer_files

import libqat
from libqat import (
    ArgumentError,
    FileError,
    UnsupportedError,
    beginning_of_text,
    llama_cpp,
    load_tokenizer,
)

ROOT = Path(__file__).resolve().parents[2]
GEMMA = Path(
    os.environ.get("LIBQAT_GEMMA3_270M_GGUF", ROOT / "out/cache/gemma-3-270m/gemma-3-270m-q4_k_m.gguf")
)
"""Never in CI: its users must accept terms."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
LETTERS = "abxyz.\u2581é日"
HEAD = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN)]
VISIBLE = ["\n", "\n\n", "  ", "   ", "<b>", "</b>"]
COUNT = 400

needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp"
)


def make_pieces(rng):
    """Letters, then pieces of pieces: many with a period, for which two ways to be made compete."""
    pieces = [*LETTERS, "aa", "aaa", "aaaa", "ab", "ba", "aba", "abab", "baba", "\u2581a", "a\u2581a"]
    while len(pieces) < COUNT - len(HEAD) - len(VISIBLE) - 256:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if len(piece) <= 8 and piece not in pieces:
            pieces.append(piece)
    return pieces


def write_vocabulary(path, seed=0, scores=None, arch="llama", prefix=False):
    """A GGUF without weights: pieces with scores in no order at all, so that short ones may come last."""
    rng = random.Random(seed)
    pieces = make_pieces(rng)
    drawn = rng.sample(range(10 * COUNT), len(pieces))
    typed = [
        *HEAD,
        *[(token, USER_DEFINED) for token in VISIBLE],
        *[(f"<0x{byte:02X}>", BYTE) for byte in range(256)],
        *[(piece, NORMAL) for piece in pieces],
    ]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in typed])
    writer.add_token_types([kind for _, kind in typed])
    plain = [-1000.0] * (COUNT - len(pieces)) + [-float(score) for score in drawn]
    writer.add_token_scores(plain if scores is None else scores(plain))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def samples(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abxyz. é日aabb", k=rng.randrange(80))) for _ in range(60)]
    units = ["".join(rng.choices("ab ", k=rng.randrange(1, 4))) for _ in range(40)]
    texts += [(unit * 20)[: rng.randrange(3, 50)] for unit in units]
    return [*texts, *TEXTS, "a<b>a</b>\n\n\na    b<bos>a<unk>\u2581<0x41>"]


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_ids_are_those_of_llama_cpp(tmp_path, seed, prefix):
    vocabulary = write_vocabulary(tmp_path / "vocabulary.gguf", seed, prefix=prefix)
    model = make_llama(vocab_size=COUNT)
    libqat.export(checkpoint_of(model), tmp_path / "a.gguf", tokenizer_from=vocabulary)
    tokenizer = load_tokenizer(vocabulary)
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        for text in samples(seed):
            assert tokenizer.encode(text).ids == llama.tokenize(text), repr(text)


@needs_llama_cpp
@pytest.mark.skipif(not GEMMA.is_file(), reason=f"needs Gemma 3 270M at {GEMMA}: libqat fetch gemma3-270m")
def test_ids_of_gemma_are_those_of_llama_cpp():
    tokenizer, rng = load_tokenizer(GEMMA), random.Random(0)
    known = sorted(tokenizer.get_vocab())
    mixed = ["".join(rng.choices(known, k=30)) for _ in range(40)]
    blocks = [(32, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x1FFFF)]
    mixed += ["".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(60)) for _ in range(40)]
    lines = ["\n" * 70, " " * 70, "a\t\tb\r\n", "<bos><start_of_turn>user\nHi<end_of_turn><h1>x</h1><unk>"]
    with llama_cpp.LlamaCpp(GEMMA) as llama:
        for text in [*TEXTS, *lines, *samples(5), *mixed]:
            assert tokenizer.encode(text).ids == llama.tokenize(text), repr(text)
        assert llama.tokenize("Hi", add_special=True) == [
            beginning_of_text(GEMMA),
            *tokenizer.encode("Hi").ids,
        ]


@needs_llama_cpp
def test_a_vocabulary_goes_to_a_folder_and_back(tmp_path):
    """What `convert --target hf` writes is what the export to GGUF takes up."""
    vocabulary = write_vocabulary(tmp_path / "vocabulary.gguf", arch="gemma3")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tokenizer_files(vocabulary, folder)
    model = make_family("gemma3", vocab_size=COUNT)
    libqat.prepare(model, POLICY)
    libqat.export(libqat.freeze(model), tmp_path / "a.gguf", tokenizer_from=folder)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    first = {name: field.contents() for name, field in gguf.GGUFReader(vocabulary).fields.items()}
    same = ("tokens", "token_type", "bos_token_id", "unknown_token_id", "add_bos_token", "add_space_prefix")
    for key in same:
        assert fields[f"tokenizer.ggml.{key}"] == first[f"tokenizer.ggml.{key}"], key
    tokenizer = load_tokenizer(vocabulary)
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        for text in samples(3):
            assert load_tokenizer(folder).encode(text).ids == llama.tokenize(text), repr(text)
            assert tokenizer.encode(text).ids == llama.tokenize(text), repr(text)
        assert llama.tokenize("a", add_special=True) == [2, *tokenizer.encode("a").ids]


@pytest.mark.parametrize("prefix", [False, True])
def test_decoding_gives_the_text_back(tmp_path, prefix):
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocabulary.gguf", prefix=prefix))
    for text in TEXTS:
        if prefix and any(token in text for token in VISIBLE):
            continue  # llama.cpp puts a space after each of them, which is there to stay
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_merges_of_lines_are_taken_as_they_are(tmp_path):
    """Gemma 4's kind: written from a tokenizer.json, read back."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tokenizer_files(write_vocabulary(tmp_path / "vocabulary.gguf"), folder)
    model = make_family("31b", vocab_size=COUNT)
    libqat.prepare(model, POLICY)
    libqat.export(libqat.freeze(model), tmp_path / "a.gguf", tokenizer_from=folder)
    original, ours = load_tokenizer(folder), load_tokenizer(tmp_path / "a.gguf")
    for text in samples(4):
        assert ours.encode(text).ids == original.encode(text).ids, repr(text)


def test_the_beginning_of_a_text_is_found(tmp_path, hf_folder):
    vocabulary = write_vocabulary(tmp_path / "vocabulary.gguf")
    assert beginning_of_text(vocabulary) == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tokenizer_files(vocabulary, folder)
    assert beginning_of_text(folder) == 2
    assert beginning_of_text(folder / "tokenizer.json") == 2
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "add_bos_token": false}')
    assert beginning_of_text(folder) is None
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<bos>"}, "add_bos_token": true}'
    )
    assert beginning_of_text(folder) == 2
    assert beginning_of_text(hf_folder) is None
    with pytest.raises(FileError, match="no file at"):
        beginning_of_text(tmp_path / "nothing")


def test_each_window_begins_with_it():
    tokens = torch.arange(10, 20)
    assert begin_windows(tokens, None, 4) is tokens
    begun = begin_windows(tokens, 2, 4)
    assert begun.tolist() == [2, 10, 11, 12, 2, 13, 14, 15, 2, 16, 17, 18, 2, 19]
    with pytest.raises(ArgumentError, match="room for a beginning"):
        begin_windows(tokens, 2, 1)


def test_questions_begin_with_it(tmp_path):
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocabulary.gguf"))
    question = libqat.Question("ab", ("xy", "z"), 0)
    [(plain, sizes, answer)] = encode_questions(tokenizer, [question])
    [(begun, *rest)] = encode_questions(tokenizer, [question], 2)
    assert rest == [sizes, answer]
    assert begun == [([2, *ids], context + 1) for ids, context in plain]


def test_scores_that_mean_nothing_are_refused(tmp_path):
    def refused(error, message, scores):
        path = write_vocabulary(tmp_path / "bad.gguf", scores=scores)
        with pytest.raises(error, match=message):
            load_tokenizer(path)

    refused(FileError, "a number for each of the 400 tokens, got 399 values", lambda plain: plain[1:])
    refused(FileError, "a number for each", lambda plain: [*plain[1:], float("nan")])
    refused(UnsupportedError, "different scores of tokens", lambda plain: [0.0] * len(plain))
