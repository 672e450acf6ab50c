import json

import gguf
import pytest
from conftest import make_llama
from exporting import KINDS, SPECIAL, TEXTS, VOCAB_SIZE, checkpoint_of, make_kind

import libqat
from libqat import llama_cpp, load_tokenizer

needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp"
)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """(kind, the tokenizer, its folder, a GGUF exported with it)."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_kind(request.param, VOCAB_SIZE)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[1]}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    path = folder / "model.gguf"
    libqat.export(checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=folder), path)
    return request.param, tokenizer, folder, path


def test_the_file_says_which_kind_and_which_tokens(exported):
    kind, tokenizer, _, path = exported
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == kind
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == VOCAB_SIZE
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        assert tokens[number] == token
    types = fields["tokenizer.ggml.token_type"]
    used = tokenizer.get_vocab_size(with_added_tokens=True)
    assert types[:2] == [3, 3]
    assert types[tokenizer.token_to_id("<tool>")] == 4
    assert types[used:] == [5] * (VOCAB_SIZE - used)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


@needs_llama_cpp
def test_llama_cpp_and_ours_give_the_ids_of_the_original(exported):
    _, tokenizer, folder, path = exported
    from_gguf, from_folder = load_tokenizer(path), load_tokenizer(folder)
    with llama_cpp.LlamaCpp(path) as llama:
        for text in TEXTS:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert from_gguf.encode(text).ids == expected, text
            assert from_folder.encode(text).ids == expected, text
            assert llama.tokenize(text) == expected, text
        assert llama.tokenize("a", add_special=True) == [0, *tokenizer.encode("a").ids]


def test_decoding_gives_the_text_back(exported):
    tokenizer = load_tokenizer(exported[3])
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_tokenizer_survives_gguf_to_gguf(exported, tmp_path):
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE))
    libqat.export(checkpoint, tmp_path / "a.gguf", tokenizer_from=exported[3])
    keys = [
        {
            name: field.contents()
            for name, field in gguf.GGUFReader(path).fields.items()
            if "tokenizer." in name
        }
        for path in (exported[3], tmp_path / "a.gguf")
    ]
    assert keys[0] == keys[1]


def test_a_saved_hugging_face_folder_is_understood(hf_folder, tmp_path):
    libqat.export(checkpoint_of(make_llama(), tokenizer=hf_folder), tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    original = load_tokenizer(hf_folder)
    ours = load_tokenizer(tmp_path / "a.gguf")
    for text in TEXTS:
        assert ours.encode(text).ids == original.encode(text).ids


def test_a_post_processor_adds_nothing(tmp_path):
    from tokenizers import processors

    tokenizer = make_kind("llama-bpe", VOCAB_SIZE)
    expected = tokenizer.encode("Hello").ids
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    assert tokenizer.encode("Hello").ids == [0, *expected]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("Hello").ids == expected


def write_gguf(path, model, pre, tokens, merges):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(libqat.FileError, match="no file at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(libqat.FileError, match=r"expected a tokenizer\.json"):
        load_tokenizer(tmp_path)
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF\3\0")
    with pytest.raises(libqat.FileError, match=r"a\.gguf"):
        load_tokenizer(path)
    write_gguf(path, "bert", "default", ["a"], ["a a"])
    with pytest.raises(libqat.UnsupportedError, match="got bert default"):
        load_tokenizer(path)
    write_gguf(path, "gpt2", "deepseek-llm", ["a"], ["a a"])
    with pytest.raises(libqat.UnsupportedError, match="deepseek-llm"):
        load_tokenizer(path)
    write_gguf(path, "gpt2", "gpt-2", ["a"], ["a b"])
    with pytest.raises(libqat.FileError, match="merges"):
        load_tokenizer(path)
    libqat.export(checkpoint_of(make_llama(), tokenizer="none"), path)
    with pytest.raises(libqat.UnsupportedError, match="got none"):
        load_tokenizer(path)
