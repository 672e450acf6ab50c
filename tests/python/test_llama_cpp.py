"""llama.cpp opens what we export and computes what we compute."""

import json

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tiny
from exporting import (
    VOCAB_SIZE,
    checkpoint_of,
    log_probabilities,
    model_of,
    read_by_gguf_py,
    relative_error,
)

import libqat
from libqat import _core, llama_cpp

pytestmark = pytest.mark.skipif(not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp")

SPREAD = 0.1
"""Standard deviation of the tiny models' weights, so that log-probabilities differ between tokens."""

# llama.cpp rounds the input of every matrix product to 8 bits: blocks of 32 with a step of (greatest / 127).
# The greatest of 32 normal numbers is about 2.2 times their rms, so the relative error of an input is
# 2.2 / 127 / sqrt(12) = 0.5 %. Two layers of about 7 such products and the head add up as sqrt(15) * 0.5 %
# = 2 % of the spread of the log-probabilities; twice that is allowed. Float matrices are multiplied in
# float32, and only the float16 key-value cache (2^-12 relative) remains, which gives 0.1 %; 0.3 % is allowed.
BOUND_8_BIT = 0.04
BOUND_FLOAT = 0.003


def some_ids(count=64):
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(
    ("grid", "bound"), [("q4_0", BOUND_8_BIT), ("q4_1", BOUND_8_BIT), ("f32", BOUND_FLOAT)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_scores_agree_with_the_shipped_weights(tmp_path, tokenizer_folder, grid, bound, tied):
    settings = {"vocab_size": VOCAB_SIZE, "tied": tied, "initializer_range": SPREAD}
    model = make_llama(**settings)
    embedding = "f32" if grid == "f32" else "q8_0"
    checkpoint = checkpoint_of(model, grid=grid, embedding=embedding, tokenizer=tokenizer_folder)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    ids = some_ids()
    scores = llama_cpp.score(tmp_path / "a.gguf", ids)
    assert len(scores) == len(ids) - 1
    assert relative_error(scores, log_probabilities(model_of(checkpoint, **settings), ids)) < bound
    if grid == "q4_0":  # the bound tells these weights from the ones before quantization
        assert relative_error(scores, log_probabilities(model.eval(), ids)) > bound


def test_scores_agree_with_a_scaled_rotary_embedding(tmp_path, tokenizer_folder):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    settings = {"vocab_size": VOCAB_SIZE, "initializer_range": SPREAD}
    model = make_llama(rope_parameters=scaled, **settings)
    checkpoint = checkpoint_of(model, grid="f32", embedding="f32", tokenizer=tokenizer_folder)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    ids = some_ids()
    scores = llama_cpp.score(tmp_path / "a.gguf", ids)
    assert relative_error(scores, log_probabilities(model.eval(), ids)) < BOUND_FLOAT
    plain = make_llama(**settings).eval()  # the same weights without the scaling
    assert relative_error(scores, log_probabilities(plain, ids)) > BOUND_FLOAT


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize(("grid", "bound"), [("q4_0", BOUND_8_BIT), ("f32", BOUND_FLOAT)])
def test_scores_of_qwen_agree(tmp_path, tokenizer_folder, name, grid, bound):
    heads = {"head_dim": 32} if name == "Qwen3" else {}
    model = make_tiny(name, vocab_size=VOCAB_SIZE, initializer_range=SPREAD, **heads).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.uniform_(-1, 1)
    embedding = "f32" if grid == "f32" else "q8_0"
    checkpoint = checkpoint_of(model, grid=grid, embedding=embedding, tokenizer=tokenizer_folder)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []
    model.load_state_dict(_core.dequantize(checkpoint))
    ids = some_ids()
    expected = log_probabilities(model, ids)
    assert relative_error(llama_cpp.score(tmp_path / "a.gguf", ids), expected) < bound
    if name == "Qwen2":  # the decoder computes it too, from the GGUF
        decoder = libqat.load_model(tmp_path / "a.gguf").decoder
        # the same float32 numbers, sums in another order
        np.testing.assert_allclose(log_probabilities_of(decoder, ids), expected, atol=1e-4)


def log_probabilities_of(decoder, ids):
    with torch.no_grad():
        logits = decoder(torch.tensor([ids]))[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def test_a_crash_of_llama_cpp_is_an_error(tmp_path):
    libqat.export(checkpoint_of(make_llama(), tokenizer="none"), tmp_path / "a.gguf")
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        with pytest.raises(libqat.FileError, match=r"a\.gguf: llama\.cpp ended with code -6 during score"):
            llama.score([1, 2, 3])  # it aborts when it looks for the text of a token
        with pytest.raises(libqat.FileError, match=r"ended with code -6"):
            llama.score([1, 2, 3])


def test_generation_repeats_and_takes_text_or_ids(tmp_path, tokenizer_folder):
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=tokenizer_folder)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    ids = libqat.load_tokenizer(tmp_path / "a.gguf").encode("Hello world").ids
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        text = llama.generate("Hello world", 8)
        assert text
        assert llama.generate(ids, 8) == text
    assert llama_cpp.generate(tmp_path / "a.gguf", ids, 8) == text


def test_a_file_is_judged_beside_its_model(tmp_path, tokenizer_folder):
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), "f32", "f32", tokenizer=tokenizer_folder)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    ids, model = some_ids(9), model_of(checkpoint, vocab_size=VOCAB_SIZE)
    calls = []
    found = llama_cpp.judge(
        tmp_path / "a.gguf",
        lambda tokens: model(tokens).logits,
        torch.tensor(ids),
        "Hello",
        n_tokens=4,
        progress=lambda *call: calls.append(call),
    )
    assert found["version"] == llama_cpp.version()
    assert found["tokens"] == 8
    assert calls[-1] == (8, 8)
    assert found["text"] == "Hello" + llama_cpp.generate(tmp_path / "a.gguf", "Hello", 4)
    scores = llama_cpp.score(tmp_path / "a.gguf", ids)
    # the same scores, from a context of another size
    np.testing.assert_allclose(found["ppl"], np.exp(-np.mean(scores)), rtol=1e-6)
    ours = np.exp(-log_probabilities(model, ids).mean())
    np.testing.assert_allclose(found["ppl_ours_same_tokens"], ours, rtol=1e-6)  # float32 beside float64
    assert found["ppl"] != found["ppl_ours_same_tokens"]


def test_progress_counts_positions(tmp_path, tokenizer_folder):
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=tokenizer_folder)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    calls = []
    llama_cpp.score(tmp_path / "a.gguf", some_ids(5), progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_interrupted_score_closes_the_model(tmp_path, tokenizer_folder):
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=tokenizer_folder)
    libqat.export(checkpoint, tmp_path / "a.gguf")

    def interrupt(done, total):
        raise KeyboardInterrupt

    llama = llama_cpp.LlamaCpp(tmp_path / "a.gguf")
    with pytest.raises(KeyboardInterrupt):
        llama.score(some_ids(), interrupt)
    with pytest.raises(libqat.ArgumentError, match="got a closed one"):
        llama.score(some_ids())
    llama.close()  # again: nothing to do


def test_nothing_is_printed(tmp_path, tokenizer_folder, capfd):
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=tokenizer_folder)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    llama_cpp.generate(tmp_path / "a.gguf", "Hello", 2)
    assert capfd.readouterr() == ("", "")


def test_errors_tell_what_llama_cpp_said(tmp_path, tokenizer_folder, monkeypatch):
    path = tmp_path / "a.gguf"
    with pytest.raises(libqat.FileError, match="no file at"):
        llama_cpp.LlamaCpp(path)
    path.write_bytes(b"GGUX")
    with pytest.raises(libqat.FileError, match=r"(?s)a\.gguf: .*invalid magic"):
        llama_cpp.LlamaCpp(path)
    libqat.export(checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=tokenizer_folder), path)
    with llama_cpp.LlamaCpp(path, context=64) as llama:
        with pytest.raises(libqat.ArgumentError, match="expected 2 to 64 ids"):
            llama.score([1])
        with pytest.raises(libqat.ArgumentError, match="got 65"):
            llama.score([1] * 65)
        with pytest.raises(libqat.Error, match=r"a\.gguf"):
            llama.score([1, VOCAB_SIZE, 2])
    monkeypatch.setattr(llama_cpp, "_PACKAGE", "no_such_package")
    assert not llama_cpp.available()
    with pytest.raises(libqat.UnsupportedError, match="pip install no_such_package"):
        llama_cpp.LlamaCpp(path)


# ---- the real model


SETTINGS = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

# As BOUND_8_BIT, but for 30 layers and for inputs with outliers, whose blocks are rounded more coarsely:
# 0.11 nats rms were measured, twice that is allowed. The mean of n tokens is then off by 0.22 / sqrt(n);
# three of these are allowed.
BOUND_SMOLLM2 = 0.22


def test_smollm2_at_q4_0(tmp_path, smollm2):
    """Round trip of the real model: requantized by rounding, exported, read and run by others."""
    original = {key: torch.from_numpy(value) for key, (_, value) in read_by_gguf_py(smollm2).items()}
    grids = {key: "q4_0" for key, value in original.items() if value.dim() == 2}
    grids["model.embed_tokens.weight"] = "q8_0"
    config = json.dumps({"model_type": "llama"} | SETTINGS)
    checkpoint = _core.freeze_tensors(
        list(original.items()), grids, config=config, tokenizer=str(smollm2), policy=""
    )
    libqat.export(checkpoint, tmp_path / "a.gguf")
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []

    shipped = _core.dequantize(checkpoint)
    file = read_by_gguf_py(tmp_path / "a.gguf")
    assert file.keys() == shipped.keys()
    differing = [
        int((values.view(np.uint32) != shipped[key].numpy().view(np.uint32)).sum())
        for key, (_, values) in file.items()
    ]
    assert sum(differing) == 0
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(shipped[key], original[key])  # Q4_0 is another grid than the source's Q4_1

    reference = make_llama(**SETTINGS)
    reference.load_state_dict(shipped | {"lm_head.weight": shipped["model.embed_tokens.weight"]})
    tokenizer = libqat.load_tokenizer(tmp_path / "a.gguf")
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        text = 'Les élèves écrivent 日本語 — in 1984, 2 + 2 = 4.\n\tif (x) { return "ok"; }<|im_end|>'
        ids = tokenizer.encode(text).ids
        assert llama.tokenize(text) == ids
        difference = np.array(llama.score(ids)) - log_probabilities(reference.eval(), ids)
        assert llama.generate("The capital of France is", 8).strip()
    assert np.sqrt((difference**2).mean()) < BOUND_SMOLLM2
    assert abs(difference.mean()) < 3 * BOUND_SMOLLM2 / np.sqrt(len(difference))
