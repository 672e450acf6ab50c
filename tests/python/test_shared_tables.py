"""A live teacher reads the student's frozen tables where they are its own."""

import pytest
import torch
from families import VOCABULARY, make_family

import libqat
from libqat import finetune, teacher

TOKENS = "model.embed_tokens.weight"
LAYERS = "model.embed_tokens_per_layer.weight"
FOUR_BITS = {"rules": [{"match": r".*layers\.\d+\..*_proj", "weight": "q4_0"}]}
OPTIONS = {"batch_size": 2, "sequence_length": 24, "telemetry_every": 0, "save_every": 0, "steps": 3}
OPTIONS["frozen"] = list(finetune.FROZEN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("e2b")
    make_family("e2b").save_pretrained(path)
    return path


@pytest.fixture
def shared(monkeypatch):
    """What each start shares: (teacher, student, names)."""
    calls = []
    share = teacher.share_frozen

    def recording(of, student):
        calls.append((of, student, share(of, student)))
        return calls[-1][2]

    monkeypatch.setattr(teacher, "share_frozen", recording)
    return calls


def start(model, folder, **options):
    tokens = torch.randint(VOCABULARY, (400,), generator=torch.Generator().manual_seed(1))
    return finetune.start(model, tokens, FOUR_BITS, folder, start="none", **(OPTIONS | options))


def losses(run):
    seen = []
    run.trainer.run(lambda report: seen.append(report.loss) or True)
    return seen


@pytest.mark.parametrize(("dtype", "names"), [("float32", [TOKENS, LAYERS]), ("bfloat16", [LAYERS])])
def test_frozen_tables_have_one_storage(folder, tmp_path, shared, dtype, names):
    run = start(folder, tmp_path, compute_dtype=dtype)
    [(theirs, student, found)] = shared
    assert sorted(found) == sorted(names)
    ours, theirs = student.parameters(), theirs.parameters()
    for name in ours:
        assert (ours[name].data_ptr() == theirs[name].data_ptr()) == (name in names), name
        assert not theirs[name].requires_grad
    before = ours[LAYERS].detach().clone()
    run.trainer.run(lambda report: True)
    assert torch.equal(theirs[LAYERS], before)


def test_the_teacher_says_the_same(folder, tmp_path, monkeypatch):
    """Bit for bit in float32, where nothing is rounded."""
    one = losses(start(folder, tmp_path / "a", compute_dtype="float32"))
    narrow = losses(start(folder, tmp_path / "b", compute_dtype="bfloat16"))
    monkeypatch.setattr(teacher, "share_frozen", lambda *models: [])
    assert losses(start(folder, tmp_path / "c", compute_dtype="float32")) == one
    # The table's rows keep digits that bfloat16 rounds, by 2^-9; the divergence of two models moves by less.
    apart = losses(start(folder, tmp_path / "d", compute_dtype="bfloat16"))
    assert narrow == pytest.approx(apart, rel=0.05)


def test_what_trains_or_has_moved_is_not_shared(folder, tmp_path, shared):
    start(folder, tmp_path / "a", compute_dtype="float32", frozen=[r"model\.embed_tokens"])
    assert shared[-1][2] == [TOKENS]
    loaded = libqat.load_model(folder)
    frozen_copy = loaded.decoder.frozen_copy(torch.bfloat16)
    for parameter in loaded.decoder.parameters().values():
        parameter.requires_grad_(False)
    with torch.no_grad():
        loaded.decoder.parameters()[LAYERS][-1, -1] += 1  # as a start or a resumed run may have
    assert LAYERS not in teacher.share_frozen(frozen_copy, loaded.decoder)
