"""llama.cpp computes the Gemma and Qwen models of every shape as transformers does."""

import numpy as np
import pytest
import torch
from exporting import log_probabilities, make_kind
from families import SHAPES, VOCABULARY, with_two_bits
from gguf_families import prepared_checkpoint
from shapes import FULL, SLIDING

import libqat
from libqat import llama_cpp

pytestmark = pytest.mark.skipif(not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp")


VARIANTS = [
    ("gemma3", {"layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL, SLIDING]}),
    ("gemma3", {"num_hidden_layers": 5, "final_logit_softcapping": 5.0, "tie_word_embeddings": False}),
    ("e2b", {"tie_word_embeddings": False}),
    (
        "31b",
        {
            "final_logit_softcapping": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
    ),
    (
        "31b",
        {
            "attention_k_eq_v": False,
            "per_layer_config": {i: {"head_dim": 64, "num_key_value_heads": 1} for i in (1, 3)},
        },
    ),
]
"""What the published sizes do not have, but a configuration can say."""


def some_ids(count=48):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_the_shipped_weights(tmp_path, shape):
    make_kind("smollm", VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    model, checkpoint = prepared_checkpoint(shape, tokenizer=tmp_path, policy=with_two_bits())
    libqat.export(checkpoint, tmp_path / "a.gguf")
    ids = some_ids()
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        scores = np.array(llama.score(ids))
        chosen = [listed[0][0] for listed in llama.likeliest(ids)]
    # 8-bit inputs have a relative error of 0.5 % per product (see test_llama_cpp.py); 5 layers of 9 products
    # and the head add up as sqrt(46) * 0.5 % = 3.4 % of the spread; twice that is allowed.
    assert relative_error(scores, log_probabilities(model, ids), shape) < 0.07
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :, : checkpoint_rows(tmp_path / "a.gguf")]
    best, second = logits.topk(2).values.T
    clear = best - second > 0.2  # two errors of twice 7 % of the spread, 0.8
    swapped = [c != e for c, e, sure in zip(chosen, logits.argmax(-1), clear, strict=True) if sure]
    assert len(swapped) > len(ids) / 4
    assert sum(swapped) <= (len(ids) // 10 if shape == "26b" else 0)
    with libqat.prepare(model, with_two_bits()).enabled(False):  # the bound tells these weights from others
        assert relative_error(scores, log_probabilities(model, ids), shape) > 0.14


def checkpoint_rows(path):
    """Gemma 3's embedding ends with the tokenizer's tokens."""
    return libqat.import_checkpoint(path).weight("model.embed_tokens.weight").shape[0]


def relative_error(scores, expected, shape):
    """Rms against the spread. Tokens between two experts may get the other one: a tenth is left out."""
    errors = np.sort((scores - expected) ** 2)
    kept = len(errors) * 9 // 10 if shape == "26b" else len(errors)
    return np.sqrt(errors[:kept].mean()) / expected.std()


@pytest.mark.parametrize(("shape", "changes"), [*((shape, {}) for shape in SHAPES), *VARIANTS])
def test_llama_cpp_chooses_the_same_tokens(tmp_path, shape, changes):
    """With float matrices nothing but float32 sums and the float16 cache differ."""
    make_kind("smollm", VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    model, checkpoint = prepared_checkpoint(shape, tokenizer=tmp_path, policy={"rules": []}, **changes)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    libqat.export(libqat.import_checkpoint(tmp_path / "a.gguf"), tmp_path / "b.gguf", tokenizer_from=tmp_path)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    ids = some_ids(32)
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        listed = llama.likeliest(ids, count=2)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logs = logits[:, : checkpoint_rows(tmp_path / "a.gguf")].log_softmax(-1)
    best, second = logs.topk(2).values.T
    # the cache rounds keys and values to 2^-12 of themselves, which 5 layers of attention amplify: 0.3 % of
    # log-probabilities of about 5, and as much for the second, may swap two that are nearer than that
    bound = 0.015
    clear = (best - second > 2 * bound).tolist()
    chosen = [first for (first, _), _ in listed]
    expected = logs.argmax(-1).tolist()
    assert [c for c, sure in zip(chosen, clear, strict=True) if sure] == [
        e for e, sure in zip(expected, clear, strict=True) if sure
    ]
    assert sum(clear) > len(ids) / 2
    np.testing.assert_allclose([first for (_, first), _ in listed], best.numpy(), atol=bound)
