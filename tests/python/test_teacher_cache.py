"""Training from a teacher's cached answers: Python's side, and the command line's."""

import contextlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import libqat
from libqat import cli, finetune, teacher

POLICY = {"rules": [{"match": ".*_proj", "weight": "int2_channel"}]}
OPTIONS = {
    "steps": 6, "batch_size": 2, "sequence_length": 16, "compute_dtype": "float32", "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(320, (400,), generator=torch.Generator().manual_seed(4))


def start(folder, tokens, run, **settings):
    return finetune.start(folder, tokens, POLICY, run, **(OPTIONS | settings))


def test_a_run_builds_its_cache_and_says_what_it_costs(hf_folder, tokens, tmp_path):
    seen = []
    run = start(
        hf_folder, tokens, tmp_path / "run", teacher_cache=True, teacher_top_k=319, on_cache=seen.append
    )
    assert [now.done for now in seen] == [2, 4, 6, 8, 10, 12, 14]
    assert {now.total for now in seen} == {14}  # of the text's 25 windows, those that run and probe read
    check = run.cache_check
    assert check.tokens == 2 * 2 * 15
    assert check.cached == pytest.approx(check.live, rel=1e-3)  # all but one outcome, in half precision
    assert check.cosine > 0.999
    assert run.train()
    assert (tmp_path / "run" / teacher.FILE).stat().st_size == 64 + 14 * (8 + 15 * (319 * 4 + 4) + 8)

    live = start(hf_folder, tokens, tmp_path / "live")
    assert live.cache_check is None
    assert live.train()
    ours, theirs = (load_file(tmp_path / name / "state.safetensors") for name in ("run", "live"))
    moved = ours["latent/model.layers.0.mlp.up_proj.weight"]
    expected = theirs["latent/model.layers.0.mlp.up_proj.weight"]
    before = libqat.load_model(hf_folder).decoder.parameters()["model.layers.0.mlp.up_proj.weight"]
    # Half precision moves gradients by 1e-3 or so, of which Adam makes steps of up to the learning rate.
    assert (moved - expected).norm() < 0.1 * (moved - before).norm()


def test_one_cache_serves_many_runs(hf_folder, tokens, tmp_path):
    path = tmp_path / "shared.cache"
    first = start(hf_folder, tokens, tmp_path / "a", teacher_cache=path, teacher_top_k=8)
    assert first.cache_check.cached < first.cache_check.live
    bytes_before = path.read_bytes()
    again = start(hf_folder, tokens, tmp_path / "b", teacher_cache=str(path), teacher_top_k=8)
    assert again.cache_check is None
    assert path.read_bytes() == bytes_before
    more = start(hf_folder, tokens, tmp_path / "c", teacher_cache=path, teacher_top_k=8, steps=20)
    assert more.cache_check is not None
    assert path.read_bytes()[: len(bytes_before)] == bytes_before


def test_resuming_with_a_cache_ends_in_the_same_bytes(hf_folder, tokens, tmp_path):
    cache = {"teacher_cache": tmp_path / "cache", "teacher_top_k": 8}
    assert start(hf_folder, tokens, tmp_path / "whole", **cache).train()
    assert not start(hf_folder, tokens, tmp_path / "run", **cache).train(lambda report: report.step < 3)
    resumed = start(hf_folder, tokens, tmp_path / "run", resume=True, **cache)
    assert resumed.trainer.step == 3
    assert resumed.train()
    for name in ("state.safetensors", "model.qat.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(libqat.FileError, match="another run: teacher"):
        start(hf_folder, tokens, tmp_path / "run", resume=True)


def test_a_cache_of_something_else_is_refused(hf_folder, tokens, tmp_path):
    path = tmp_path / "cache"
    start(hf_folder, tokens, tmp_path / "a", teacher_cache=path, teacher_top_k=8)

    def refused(match, folder=hf_folder, text=tokens, **settings):
        with pytest.raises(libqat.FileError, match=match):
            start(folder, text, tmp_path / "b", **({"teacher_cache": path, "teacher_top_k": 8} | settings))

    refused("another top_k: expected 9, got 8", teacher_top_k=9)
    refused("another length: expected 15, got 16", sequence_length=15)
    refused("another text", text=tokens[1:])
    refused("another teacher", compute_dtype="bfloat16")
    refused("another temperature", objective={"kl": 1.0, "ce": 0.0, "temperature": 2.0})
    refused("64 bytes that begin with QATTCH1", teacher_cache=hf_folder / "config.json")
    with pytest.raises(libqat.ArgumentError, match="top_k"):
        start(hf_folder, tokens, tmp_path / "b", teacher_cache=path, teacher_top_k=0)
    assert not (tmp_path / "b").exists()


def test_without_a_divergence_no_cache_is_built(hf_folder, tokens, tmp_path):
    run = start(hf_folder, tokens, tmp_path, teacher_cache=True, objective={"kl": 0.0, "ce": 1.0})
    assert run.cache_check is None
    assert not (tmp_path / teacher.FILE).exists()


def test_an_exception_while_building_is_raised_and_the_rest_built_later(hf_folder, tokens, tmp_path):
    def stop(now):
        if now.done == 4:
            raise ZeroDivisionError

    settings = {"teacher_cache": tmp_path / "cache", "teacher_top_k": 8}
    with pytest.raises(ZeroDivisionError):
        start(hf_folder, tokens, tmp_path / "run", on_cache=stop, **settings)
    seen = []
    start(hf_folder, tokens, tmp_path / "run", on_cache=seen.append, **settings)
    assert [now.done for now in seen] == [6, 8, 10, 12, 14]


def test_answers_are_the_teachers(hf_folder, tokens, tmp_path):
    loaded = libqat.load_model(hf_folder)
    data = libqat.TokenData.from_tensor(tokens, 320)
    plan = libqat.CachePlan(data, 8, libqat.fingerprint(loaded.decoder, "note"), **OPTIONS)
    assert len(plan.windows) == 14
    path = tmp_path / "cache"
    assert libqat.TeacherCache.missing(path, plan) == 14
    assert (
        libqat.TeacherCache.build(
            path, plan, lambda t: loaded.decoder(t), data, lambda now: now.done < 6, **OPTIONS
        )
        is False
    )
    assert libqat.TeacherCache.missing(path, plan) == 8
    assert libqat.TeacherCache.build(path, plan, loaded.decoder, data, **OPTIONS)
    ids, log_p = libqat.TeacherCache.open(path, plan).answer(plan.windows[:3])
    with torch.no_grad():
        logits = loaded.decoder(data.read(plan.windows[:3], 16))[:, :-1]
    expected = torch.log_softmax(logits, -1)
    assert ids.equal(expected.topk(8).indices.sort(-1).values)
    # Half precision keeps 11 bits of numbers below 8.
    torch.testing.assert_close(log_p[..., :8], expected.gather(-1, ids), rtol=2**-11, atol=1e-5)
    rest = 1 - expected.gather(-1, ids).double().exp().sum(-1)
    torch.testing.assert_close(log_p[..., 8].double().exp(), rest, rtol=1e-4, atol=0)


# ---- the command line


def command(monkeypatch, *arguments):
    """The exit code of `libqat finetune` in this process."""
    monkeypatch.setattr(sys, "argv", ["libqat", "finetune", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code


def test_command_line(hf_folder, text_file, tmp_path, monkeypatch, capsys):
    code = command(
        monkeypatch, hf_folder, "--text", text_file, "--out", tmp_path, "--steps", 2, "--sequence-length", 16,
        "--teacher-cache", "auto", "--teacher-top-k", 16, "--json",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "asking the teacher" in err
    assert "cosine of their gradients" in err
    assert json.loads(out)["steps"] == 2
    assert json.loads((tmp_path / "run.json").read_text())["teacher"]["top_k"] == 16
    assert (tmp_path / "teacher.cache").exists()


def test_ctrl_c_while_building_keeps_the_answers(hf_folder, text_file, tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def interrupted(title):
        def update(done, total, note=""):
            if title == "asking the teacher" and done == 4:
                raise KeyboardInterrupt

        yield update

    arguments = [
        hf_folder, "--text", text_file, "--out", tmp_path / "run", "--steps", 4, "--sequence-length", 16,
        "--teacher-cache", tmp_path / "cache", "--teacher-top-k", 8,
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(cli.console, "progress", interrupted)
        assert command(patch, *arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "cache").stat().st_size == 64 + 4 * (8 + 15 * (8 * 4 + 4) + 4 + 8)
    assert command(monkeypatch, *arguments) == 0
