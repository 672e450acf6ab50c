"""The parts of examples/custom_encoder.py on a tiny encoder: measures, batches, training, reading back."""

import math

import pytest
import torch
from custom_encoder import CANDIDATES
from encoder import qat, sentences
from torch import nn
from transformers import BertConfig, BertModel

from libqat import data


def words(texts, **_):
    """A tokenizer of one token per word: [CLS] words [SEP], padded to the longest."""
    rows = [[1, *(3 + len(word) for word in text.split()), 2] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": torch.zeros_like(ids)}


def make_encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return BertModel(config, add_pooling_layer=False).eval()


TEXTS = [
    "a bb ccc",
    "dddd",
    "a a a a a a",
    "bb dddd a",
    "ccc bb",
    "eeeee a bb ccc dddd",
    "ffffff",
    "a ffffff",
]
POLICY = {"rules": [{"match": ".*", "kind": "linear", "weight": "int2_g32"}]}


def test_rank_products_average_to_spearmans_correlation():
    ratings = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert sentences.rank_products(ratings.exp(), ratings).mean() == pytest.approx(1)
    assert sentences.rank_products(-ratings, ratings).mean() == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 1, -1, 1, -1
    assert sentences.rank_products(torch.tensor([1.0, 3, 2, 5, 4]), ratings).mean() == pytest.approx(
        1 - 24 / 120
    )
    # equal values share a rank: 1, 2.5, 2.5, 4, 5 against 1 .. 5
    tied = sentences.rank_products(torch.tensor([0.0, 7, 7, 8, 9]), ratings).mean()
    assert tied == pytest.approx(9.5 / math.sqrt(9.5 * 10))


def test_regression_finds_a_linear_rating():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    fitted = sentences.Regression(x, x @ weights + 3)
    # ridge regression shrinks by about sentences.RIDGE / N
    torch.testing.assert_close(fitted.weights, weights, rtol=3 * sentences.RIDGE / 2000, atol=0)
    torch.testing.assert_close(fitted(x), x @ weights + 3, rtol=0, atol=0.01)


def test_same_neighbour_ignores_the_sentence_itself():
    angles = torch.tensor([0.0, 0.1, 1.0, 1.2])
    reference = torch.stack([angles.cos(), angles.sin()], 1)
    assert sentences.same_neighbour(reference, reference).tolist() == [1, 1, 1, 1]
    moved = torch.tensor([0.0, 1.1, 1.0, 1.2])  # the second now has the third beside it, the first too
    moved = torch.stack([moved.cos(), moved.sin()], 1)
    assert sentences.same_neighbour(moved, reference).tolist() == [0, 0, 0, 0]


def test_held_out_sentences_are_not_trained_on(monkeypatch):
    def rated(name, count):
        return [
            data.RatedSentence(f"{name} {i // 2}", i / 10, str(i)) for i in range(count)
        ]  # each one twice

    made = {name: rated(name, 40) for name in ("movies", "amazon", "nyt", "tweets")}
    monkeypatch.setattr(data, "rated_sentences", lambda cache: made)
    texts = sentences.read(judged=8, regression=10, seed=0)
    assert {name: len(judged.texts) for name, judged in texts.judged.items()} == {
        "movies": 8,
        "nyt": 8,
        "amazon": 8,
    }
    assert not set(texts.judged["movies"].texts) & set(texts.training)
    assert texts.regression.texts == texts.training[:10]
    assert {text.split()[0] for text in texts.training} == {"movies", "tweets"}
    assert texts.regression.ratings.shape == (10,)
    assert sentences.read(judged=8, regression=10, seed=0).training == texts.training
    assert sentences.read(judged=8, regression=10, seed=1).training != texts.training


def test_embeddings_are_means_over_real_tokens_in_the_given_order(monkeypatch):
    model = make_encoder()
    monkeypatch.setattr(sentences, "READ_AT_ONCE", 3)
    found = sentences.embed(model, words, TEXTS)
    for text, embedding in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            expected = nn.functional.normalize(model(**words([text])).last_hidden_state[0].mean(0), dim=0)
        # another order of float32 sums, because of the padding
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-6)


def test_batches_show_every_sentence_before_one_comes_again():
    options = qat.Training(steps=6, batch_size=2, seed=0)
    made = qat.batches(words, TEXTS, options)
    assert len(made) == 6
    seen = [tuple(row[row > 0].tolist()) for batch in made for row in batch["input_ids"]]
    everything = sorted(tuple(row[row > 0].tolist()) for row in words(TEXTS)["input_ids"])
    assert sorted(seen[:8]) == everything
    again = qat.batches(words, TEXTS, options)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, again, strict=True))


def test_padding_does_not_count_in_the_error():
    target = torch.ones(1, 3, 2)
    hidden = target.clone()
    hidden[0, 1] += 0.5
    hidden[0, 2] += 100
    assert qat.relative_error(hidden, target, torch.tensor([[1, 1, 0]])) == pytest.approx(0.5 / 4)


def test_every_candidate_covers_linears_and_embeddings():

    for candidate in CANDIDATES:
        grids = {n: q.grid for n, q in qat.attach(make_encoder(), candidate.policy).quantizers().items()}
        assert len(grids) == 3 + 2 * 6
        assert grids["embeddings.word_embeddings.weight"] == candidate.embeddings
        assert grids["encoder.layer.1.attention.output.dense.weight"] == candidate.attention
        assert grids["encoder.layer.1.output.dense.weight"] == candidate.feed_forward


def test_learned_scales_start_from_searched_ones():
    plain = qat.attach(make_encoder(), POLICY)
    searched = qat.attach(make_encoder(), POLICY, "learned")
    weights = dict(make_encoder().named_parameters())
    for own, found in zip(plain.slots, searched.slots, strict=True):
        errors = [
            (slot.layers[0][1].fake_quantized() - weights[slot.name]).view(-1, 32).square().sum(1)
            for slot in (own, found)
        ]
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()  # sums of float32 in another order
        assert errors[1].sum() < 0.9 * errors[0].sum()  # 2 bits: most blocks have a better scale


def embedding_loss(prepared):
    reference = sentences.embed(make_encoder(), words, TEXTS)
    return 1 - (sentences.embed(prepared.model, words, TEXTS) * reference).sum(1).mean()


def test_guided_rounding_keeps_the_sentence_vectors():
    searched = qat.attach(make_encoder(), POLICY, "learned")
    guided = qat.attach(make_encoder(), POLICY, "learned")
    torch.set_num_threads(1)  # such small products gain nothing from a second one
    steps = qat.batches(words, TEXTS, qat.Training(steps=4, batch_size=8, seed=0))
    seen = []
    qat.guide(guided, steps, lambda *update: seen.append(update))
    assert [update[:2] for update in seen] == [(layer, 12) for layer in range(1, 13)]
    assert embedding_loss(guided) < 0.7 * embedding_loss(searched)


def test_a_sentence_vector_does_not_depend_on_padding():
    model = make_encoder()
    batch = words(TEXTS)
    batch["input_ids"][batch["attention_mask"] == 0] = 30  # no word has so many letters
    qat.sentence_vectors(model, batch).square().mul(torch.arange(64)).sum().backward()
    rows = model.embeddings.word_embeddings.weight.grad.abs().amax(1)
    assert rows[30] == 0
    assert (rows[batch["input_ids"].unique()[:-1]] > 0).all()


@pytest.mark.parametrize("scale", ["reference", "learned"])
def test_training_brings_the_rounded_encoder_nearer_and_ships_what_it_trained(tmp_path, scale):
    torch.set_num_threads(1)  # such small products gain nothing from a second one
    teacher = make_encoder()
    steps = qat.batches(words, TEXTS, qat.Training(steps=40, batch_size=4, seed=0))
    targets = qat.token_vectors(teacher, steps, lambda *_: None)
    prepared = qat.attach(teacher, POLICY, scale)
    reference = sentences.embed(teacher, words, TEXTS)

    def cosine(model):
        return (sentences.embed(model, words, TEXTS) * reference).sum(1).mean()

    rounded = qat.ship(prepared, tmp_path / "ptq.qat.safetensors")
    tables = [e.weight.clone() for e in prepared.model.embeddings.modules() if isinstance(e, nn.Embedding)]
    starts = {name: scales.detach().clone() for name, scales in prepared.scale_parameters().items()}
    notes = []
    qat.train(prepared, steps, targets, 3e-3, 3e-3, lambda *update: notes.append(update))
    assert [note[:2] for note in notes] == [(step, 40) for step in range(1, 41)]
    assert len(starts) == (12 if scale == "learned" else 0)
    assert not any(torch.equal(starts[name], now) for name, now in prepared.scale_parameters().items())
    trained = qat.ship(prepared, tmp_path / "qat.qat.safetensors")
    assert cosine(trained) > cosine(rounded)
    assert torch.equal(sentences.embed(trained, words, TEXTS), sentences.embed(prepared.model, words, TEXTS))
    after = [e.weight for e in prepared.model.embeddings.modules() if isinstance(e, nn.Embedding)]
    assert all(torch.equal(a, b) for a, b in zip(tables, after, strict=True))
    assert type(trained.encoder.layer[0].output.dense) is nn.Linear

    with torch.no_grad():
        prepared.model.encoder.layer[0].output.dense.weight[0] += 1  # the live model moves on
    assert qat.differing_values(prepared, trained) > 0
