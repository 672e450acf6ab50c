"""Scores against numpy in float64, for Python functions and decoders alike."""

import json
import threading

import numpy as np
import pytest
import torch
from conftest import make_llama

from libqat import ArgumentError, _core

VOCABULARY = 23


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def closed_form(p: np.ndarray, q: np.ndarray, targets: np.ndarray) -> tuple[float, float, float]:
    """nll and kl in nats and top-1 of q, from logits [n, V] of each predicted position."""
    log_p, log_q = log_softmax(p.astype(np.float64)), log_softmax(q.astype(np.float64))
    nll = -log_q[np.arange(len(targets)), targets].mean()
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    return nll, kl, (log_p.argmax(-1) == log_q.argmax(-1)).mean()


@pytest.fixture
def tables() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 2
    return p, p + torch.randn(VOCABULARY, VOCABULARY, generator=generator)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (101,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_llama(
        seed=3, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def test_functions_are_scored_by_the_definitions(tables, tokens):
    p, q = tables
    scores = _core.compare(lambda t: p[t], [lambda t: q[t]], tokens, window=20, batch=3)
    predicted = [i for i in range(100) if i % 20 != 19]  # token 100 is alone in its window
    targets = tokens.numpy()[[i + 1 for i in predicted]]
    rows = tokens.numpy()[predicted]
    for score, table in zip(scores, (p, q), strict=True):
        nll, kl, top1 = closed_form(p.numpy()[rows], table.numpy()[rows], targets)
        assert score.tokens == len(predicted)
        # float32 log-probabilities of at most 15 in magnitude: 2^-24 relative each.
        assert score.nll == pytest.approx(nll, abs=2e-6)
        assert score.kl == pytest.approx(kl, abs=2e-6)
        assert score.top1 == pytest.approx(top1, abs=1e-12)
        assert score.perplexity == pytest.approx(np.exp(score.nll), rel=1e-15)
    assert scores[1].kl > 0.1
    assert len(scores[0].window_nll) == 5
    assert np.mean(scores[1].window_kl) == pytest.approx(scores[1].kl, rel=1e-12)
    assert "kl=" in repr(scores[1])


def test_decoders_equal_the_same_decoders_as_functions(folder, tokens):
    reference = _core.load_model(folder).decoder
    quantized = _core.load_model(folder).decoder
    policy = _core.Policy.from_json(json.dumps({"rules": [{"match": ".*_proj", "weight": "int2_channel"}]}))
    prepared = _core.prepare_decoder(quantized, policy)
    native = _core.compare(reference, [prepared, reference], tokens, window=32)
    wrapped = _core.compare(
        lambda t: reference(t), [lambda t: quantized(t), lambda t: reference(t)], tokens, window=32
    )
    assert [s.kl for s in native] == [s.kl for s in wrapped]
    assert [s.nll for s in native] == [s.nll for s in wrapped]
    assert native[1].kl > 1e-3
    assert native[2].kl == 0
    assert native[2].top1 == 1
    prepared.set_enabled(False)
    assert _core.compare(reference, [prepared], tokens)[1].kl == 0
    prepared.set_enabled(True)


def test_decoders_follow_autocast(folder, tokens):
    decoder = _core.load_model(folder).decoder
    plain = _core.compare(decoder, [], tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = _core.compare(decoder, [], tokens)[0]
    assert half.nll != plain.nll
    assert half.nll == pytest.approx(plain.nll, rel=0.02)  # bfloat16 keeps 8 bits


def test_decoders_run_without_the_gil(folder, tokens):
    """Another thread makes progress while a decoder is scored: it ends the scoring."""
    decoder = _core.load_model(folder).decoder
    go = threading.Event()
    thread = threading.Thread(target=go.set)
    seen = []

    def progress(done, total):
        if not seen:
            thread.start()
            assert go.wait(30)
        seen.append((done, total))
        return len(seen) < 2

    score = _core.compare(decoder, [], tokens, window=10, batch=2, progress=progress)[0]
    thread.join()
    assert seen == [(18, 90), (36, 90)]
    assert score.tokens == 36


def test_errors_in_callbacks_reach_the_caller(tables, tokens):
    p, _ = tables

    def broken(_):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        _core.compare(broken, [], tokens)
    with pytest.raises(LookupError, match="mine"):
        _core.compare(lambda t: p[t], [], tokens, progress=lambda done, total: broken(done))


def test_bad_arguments_are_named(tables, tokens):
    p, _ = tables
    with pytest.raises(ArgumentError, match=r"candidates\[1\]: expected a decoder or a function"):
        _core.compare(lambda t: p[t], [lambda t: p[t], 7], tokens)
    with pytest.raises(ArgumentError, match="logits as a tensor"):
        _core.compare(lambda t: None, [], tokens)
    with pytest.raises(ArgumentError, match="at least 2 tokens"):
        _core.compare(lambda t: p[t], [], tokens[:1])
    with pytest.raises(ArgumentError, match=r"candidates\[0\]: expected float logits"):
        _core.compare(lambda t: p[t], [lambda t: p[t][..., :3]], tokens)


def test_share_removed():
    assert _core.share_removed(0.4, 0.1) == pytest.approx(0.75)
    assert np.isnan(_core.share_removed(0.0, 0.1))
