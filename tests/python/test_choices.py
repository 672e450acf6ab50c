"""Multiple choice: reading questions, the joint of context and choice, and scores against transformers."""

import json

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer
from libqat.choices import encode, encode_questions

import libqat
from libqat import ArgumentError, FileError, Question

QUESTIONS = [
    Question("The name of the language is", ("Python", "the statement list", "a"), 0),
    Question("An expression such as", ("x + y", "print"), 1),
    Question("Which module is imported?\nAnswer:", ("A", "B", "C", "D"), 2),
    Question("Übung macht den", ("Meister", "größeren Fleiß"), 1, delimiter=" "),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama(hf_folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(hf_folder).eval()


def reference_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The rule of lm-evaluation-harness in its own words: both halves as ids."""
    trailing = len(context) - len(context.rstrip())
    if trailing:
        context, continuation = context[:-trailing], context[-trailing:] + continuation
    whole = tokenizer.encode(context + continuation).ids
    return tokenizer.encode(context).ids, whole[len(tokenizer.encode(context).ids) :]


@torch.no_grad()
def reference_score(llama, context: list[int], continuation: list[int]) -> float:
    logits = llama(torch.tensor([context + continuation])).logits[0].double()
    log_p = torch.log_softmax(logits, -1)
    return sum(log_p[len(context) + i - 1, token].item() for i, token in enumerate(continuation))


# ---- tokens


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("The answer is", " Python"),
        ("The answer is ", "Python"),
        ("The answer is\n\t ", "Python"),
        ("The answer is", "Python"),
        ("impo", "rt statements"),
        ("x = 12", "345"),
        ("größ", "er"),
    ],
)
def test_the_joint_is_cut_as_in_lm_evaluation_harness(context, continuation, tokenizer):
    ((tokens, border),) = encode(tokenizer, [(context, continuation)])
    head, tail = reference_pair(tokenizer, context, continuation)
    assert tokens[border:] == tail
    assert tokens == tokenizer.encode(context + continuation).ids, "the model reads the text as one"
    assert border == len(head)


def test_a_token_across_the_joint_is_scored(tokenizer):
    """Where context and choice melt into one token, that token is what is left to score."""
    word = max((t for t in tokenizer.get_vocab() if t.isalpha() and t.isascii()), key=len)
    ((tokens, border),) = encode(tokenizer, [(f"the {word[:-1]}", word[-1])])
    assert border == len(tokens) - 1
    assert tokenizer.decode(tokens[border:]).endswith(word[-1])


def test_a_delimiter_joins_only_what_has_no_whitespace_of_its_own():
    def whole(question, choice, **options):
        return "".join(Question(question, (choice, "x"), 0, **options).texts()[0])

    assert whole("Q:", "A") == "Q: A"
    assert whole("Q: ", "A") == "Q: A"
    assert whole("Q:\n", "A") == "Q:\nA"
    assert whole("Q:", " A") == "Q: A"
    assert whole("Q:", "A", delimiter="") == "Q:A"
    assert whole("Q:", "A", delimiter="\n") == "Q:\nA"


# ---- scores


def test_scores_equal_transformers(hf_folder, llama, tokenizer):
    decoder = libqat.load_model(hf_folder).decoder
    asked = encode_questions(tokenizer, QUESTIONS)
    split = libqat.score_choices(decoder, asked)
    whole = libqat.score_choices(lambda tokens: llama(tokens).logits, asked, batch_tokens=64)
    for index, question in enumerate(QUESTIONS):
        expected = np.array(
            [reference_score(llama, *reference_pair(tokenizer, *pair)) for pair in question.texts()]
        )
        # float32 models of two layers, sums of up to 15 log-probabilities of about 6
        np.testing.assert_allclose(split.log_likelihoods[index], expected, atol=2e-4)
        np.testing.assert_allclose(whole.log_likelihoods[index], expected, atol=2e-4)
        assert split.chosen[index] == expected.argmax()
        per_byte = expected / [len(choice.encode()) for choice in question.choices]
        assert split.chosen_per_byte[index] == per_byte.argmax()
    assert asked[3][1] == [7, 17], "bytes, not characters, and without the delimiter"


def test_an_entry_counts_answers_and_agreement(tokenizer):
    """Models that prefer one token each, so that their choices are known."""
    texts = {choice: tokenizer.encode("Which?" + choice).ids[-1] for choice in (" A", " B", " C")}
    questions = [Question("Which?", (" A", " B", " C"), answer) for answer in (0, 0, 1, 2, 1, 0)]

    def always(choice):
        def logits(tokens):
            result = torch.zeros(*tokens.shape, 320)
            result[..., texts[choice]] = 5.0
            return result

        return logits

    models = {"float": always(" A"), "ptq": always(" B"), "qat": always(" A")}
    entry = libqat.compare_choices(models, questions, tokenizer, name="abc", resamples=200, seed=1)
    assert entry["name"] == "abc"
    assert entry["questions"] == 6
    by_row = {row["row"]: row for row in entry["rows"]}
    assert by_row["float"]["accuracy"] == by_row["qat"]["accuracy"] == 3 / 6
    assert by_row["ptq"]["accuracy"] == by_row["ptq"]["accuracy_norm"] == 2 / 6
    assert [by_row[row]["agreement"] for row in ("float", "ptq", "qat")] == [1, 0, 1]
    right = [float(q.answer == 1) for q in questions]
    assert by_row["ptq"]["accuracy_interval"] == list(libqat.mean_interval(right, resamples=200, seed=1))
    assert by_row["ptq"]["difference"] == pytest.approx(-1 / 6)
    apart = [float(q.answer == 1) - float(q.answer == 0) for q in questions]
    assert by_row["ptq"]["difference_interval"] == list(libqat.mean_interval(apart, resamples=200, seed=1))
    assert by_row["qat"]["difference_interval"] == [0, 0]
    assert "difference" not in by_row["float"]
    json.dumps(entry, allow_nan=False)


def test_progress_runs_over_all_models_and_questions_may_be_dicts(hf_folder, tokenizer):
    decoder = libqat.load_model(hf_folder).decoder
    seen = []
    asked = [{"question": "a", "choices": ["b", "c"], "answer": 1}] * 3
    libqat.compare_choices(
        {"float": decoder, "qat": decoder}, asked, tokenizer, progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (12, 12)
    assert [at[0] for at in seen] == sorted(at[0] for at in seen)
    with pytest.raises(ArgumentError, match=r"mine\[1\]: answer: expected .* 0 to 1, got 2"):
        libqat.compare_choices(
            {"float": decoder}, [asked[0], asked[0] | {"answer": 2}], tokenizer, name="mine"
        )


def test_quantized_weights_are_scored_while_prepared(hf_folder, tokenizer, tmp_path):
    loaded = libqat.load_model(hf_folder)
    policy = {"rules": [{"match": ".*", "weight": "int2_channel"}]}
    prepared = libqat.prepare(loaded.decoder, policy)
    asked = encode_questions(tokenizer, QUESTIONS)
    found = libqat.score_choices(prepared, asked).log_likelihoods
    libqat.save(prepared.freeze(loaded.config), tmp_path / "x.qat.safetensors")
    shipped = libqat.load_checkpoint(tmp_path / "x.qat.safetensors").decoder
    expected = libqat.score_choices(shipped, asked).log_likelihoods
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # the same weights, multiplied by another kernel
    latent = libqat.score_choices(libqat.load_model(hf_folder).decoder, asked).log_likelihoods
    assert abs(found[0][0] - latent[0][0]) > 1e-3


def test_long_questions_lose_their_beginning(tokenizer):
    model = make_llama(seed=1).eval()
    tokens, border = encode(tokenizer, [("word " * 60 + "and", " more")])[0]
    ours = libqat.log_likelihoods(lambda t: model(t).logits, [(tokens, border)], max_length=20)[0]
    rest = tokens[-21:]
    expected = reference_score(model, rest[: border - len(tokens)], tokens[border:])
    assert ours == pytest.approx(expected, abs=2e-4)


def test_long_questions_keep_the_token_that_texts_begin_with(tokenizer):
    question = libqat.Question("word " * 60 + "and", (" more", " less than that"), 0)
    plain = encode_questions(tokenizer, [question])[0][0]
    begun = encode_questions(tokenizer, [question], 1, 20)[0][0]
    for (ids, context), (kept, border) in zip(plain, begun, strict=True):
        assert kept == [1, *ids[-20:]]  # the last token is no input
        assert kept[border:] == ids[context:]
    whole = encode_questions(tokenizer, [question], 1)[0][0]
    assert [ids for ids, _ in whole] == [[1, *ids] for ids, _ in plain]
    scored = encode_questions(tokenizer, [question], 1, 2)[0][0][1]
    assert scored[1] == 1  # nothing of the choice is dropped: that is for score_choices to refuse
    assert scored[0][1:] == plain[1][0][plain[1][1] :]


# ---- files


def test_a_file_is_read(tmp_path):
    path = tmp_path / "exam.jsonl"
    lines = [
        {"question": "Q1", "choices": ["a", "b"], "answer": 1, "subject": "ignored", "id": 7},
        {
            "question": "Q2",
            "choices": ["ä\u2028", "b", "c"],
            "answer": 0,
            "context": "Text.",
            "delimiter": "",
        },
    ]
    text = "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    assert libqat.read_choices(path) == [
        Question("Q1", ("a", "b"), 1, "7"),
        Question("Text.\n\nQ2", ("ä\u2028", "b", "c"), 0, "", ""),
    ]


GOOD = {"question": "Q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "expected a JSON object"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "expected a JSON object"),
        (json.dumps(GOOD | {"question": " "}).encode(), "question: expected text"),
        (json.dumps(GOOD | {"question": 3}).encode(), "question: expected text, got 3"),
        (json.dumps(GOOD | {"choices": ["a"]}).encode(), "choices: expected a list of two or more"),
        (json.dumps(GOOD | {"choices": ["a", ""]}).encode(), "choices: expected a list of two or more"),
        (json.dumps(GOOD | {"choices": "ab"}).encode(), "choices: expected a list of two or more"),
        (json.dumps(GOOD | {"answer": 2}).encode(), "answer: expected the index of a choice, 0 to 1, got 2"),
        (json.dumps(GOOD | {"answer": -1}).encode(), "answer"),
        (json.dumps(GOOD | {"answer": "B"}).encode(), "answer"),
        (json.dumps(GOOD | {"answer": True}).encode(), "answer"),
        (json.dumps(GOOD | {"context": 1}).encode(), "context"),
        (json.dumps(GOOD | {"delimiter": None}).encode(), "delimiter"),
        (json.dumps({"question": "Q"}).encode(), "choices"),
    ],
)
def test_bad_lines_are_named_with_their_number(line, says, tmp_path):
    path = tmp_path / "exam.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(FileError, match=says) as error:
        libqat.read_choices(path)
    assert f"{path}:2" in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match="readable"):
        libqat.read_choices(tmp_path / "gone")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(FileError, match="empty file"):
        libqat.read_choices(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b'{"question": "\xfc"}')
    with pytest.raises(FileError, match="UTF-8"):
        libqat.read_choices(tmp_path / "latin")
