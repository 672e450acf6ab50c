"""Gemma's tokenizers from a tokenizer.json: llama.cpp cuts text as `tokenizers` does."""

import json

import gguf
import pytest
import torch
from exporting import TEXTS
from families import POLICY, VOCABULARY, make_family
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import libqat
from libqat import llama_cpp

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = VOCABULARY - len(SPECIAL) - len(BYTES) - 1
LINES = "the model then tells them there: this is the end of the line\nand the next one\n\n" * 4
SAMPLES = [
    "then the model tells",
    " the  end   of",
    "this\nis\n\nthe line",
    "naïve 日本 😀",
    "<|tool_call>the",
    "",
]


def words_of():
    """Pieces of some text by frequency, as BPE finds them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    trainer = trainers.BpeTrainer(vocab_size=WORDS, show_progress=False)
    tokenizer.train_from_iterator([LINES], trainer)
    return sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)


def make_tokenizer():
    """As the published ones are made from a SentencePiece model: every way to make a piece is a merge."""
    words = words_of()
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *BYTES, *words])}
    merges = [
        (word[:i], word[i:])
        for word in words
        for i in range(1, len(word))
        if word[:i] in vocabulary and word[i:] in vocabulary
    ]
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_special_tokens([AddedToken("<|tool_call>", special=True)])
    return tokenizer


def exported(tmp_path, shape, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = make_family(shape)
    libqat.prepare(model, POLICY)
    libqat.export(libqat.freeze(model), tmp_path / "a.gguf", tokenizer_from=tmp_path)
    return tmp_path / "a.gguf"


@pytest.mark.skipif(not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp")
@pytest.mark.parametrize("shape", ["gemma3", "31b"])
def test_llama_cpp_cuts_text_alike(tmp_path, shape):
    tokenizer = make_tokenizer()
    path = exported(tmp_path, shape, tokenizer)
    assert tokenizer.encode("then the model tells").ids != []
    with llama_cpp.LlamaCpp(path) as llama:
        for text in [*SAMPLES, *TEXTS]:
            assert llama.tokenize(text) == tokenizer.encode(text).ids, repr(text)
        assert llama.tokenize("the", add_special=True)[0] == 2
        assert llama.generate("the model", 4)


def test_the_keys_are_those_of_the_converters(tmp_path):
    tokenizer = make_tokenizer()
    path = exported(tmp_path, "gemma3", tokenizer)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.pre"] == "default"
    assert "tokenizer.ggml.merges" not in fields
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.get_vocab_size()
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [3, 3, 3, 2]  # control, control, control, unknown
    assert set(types[4:260]) == {6}  # bytes
    scores = fields["tokenizer.ggml.scores"]
    made = [tokenizer.token_to_id(word) for word in words_of() if len(word) > 1]
    assert [scores[token] for token in made] == [-1.0 - i for i in range(len(made))]
    assert fields["tokenizer.ggml.bos_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is True

    path = exported(tmp_path, "e2b", tokenizer)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == "gemma4"
    assert "tokenizer.ggml.pre" not in fields
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    assert set(fields["tokenizer.ggml.scores"]) == {-1000.0}
    assert fields["tokenizer.ggml.token_type"][tokenizer.token_to_id("<|tool_call>")] == 4  # visible
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def changed(tokenizer, change):
    root = json.loads(tokenizer.to_str())
    change(root)
    return Tokenizer.from_str(json.dumps(root))


def a_way_of_several(root):
    """A merge of a token that other merges make too."""
    made = ["".join(merge) for merge in root["model"]["merges"]]
    return next(i for i, token in enumerate(made) if made.count(token) > 1)


def drop_a_way(root):
    del root["model"]["merges"][a_way_of_several(root)]


def part_the_ways(root):
    merges = root["model"]["merges"]
    merges.append(merges.pop(a_way_of_several(root)))


def drop_all_ways(root):
    """BPE never makes this token; llama.cpp would."""
    merges = root["model"]["merges"]
    token = "".join(merges[-1])
    root["model"]["merges"] = [merge for merge in merges if "".join(merge) != token]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_all_ways, "merges that no scores of tokens stand for"),
        (drop_a_way, "merges that no scores of tokens stand for"),
        (part_the_ways, "merges that no scores of tokens stand for"),
        (lambda root: root.update(normalizer={"type": "NFC"}), "another normalizer"),
        (lambda root: root.update(pre_tokenizer={"type": "Whitespace"}), "and a pre_tokenizer"),
    ],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(tmp_path, change, message):
    with pytest.raises(libqat.UnsupportedError, match=message):
        exported(tmp_path, "gemma3", changed(make_tokenizer(), change))


def test_other_families_have_no_such_tokenizer(tmp_path):
    with pytest.raises(libqat.UnsupportedError, match="BPE with byte_fallback"):
        exported(tmp_path, "qwen3", make_tokenizer())


def test_ids_reach_the_rows(tmp_path):
    """The embedding of Gemma 3 ends with the tokenizer's last token, an added one."""
    tokenizer = make_tokenizer()
    path = exported(tmp_path, "gemma3", tokenizer)
    [embedding] = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight"]
    assert embedding.shape[1] == tokenizer.token_to_id("<|tool_call>") + 1
    assert torch.tensor(tokenizer.encode("the").ids).max() < embedding.shape[1]
