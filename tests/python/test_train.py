"""The trainer from Python: the same steps as a plain PyTorch loop, data, interruption, errors."""

import _thread
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file

from libqat import ArgumentError, FileError, _core

VOCABULARY = 41
POLICY = {"rules": [{"match": ".*_proj", "weight": "int2_channel"}]}
OPTIONS = {
    "steps": 8,
    "batch_size": 2,
    "sequence_length": 12,
    "learning_rate": 3e-3,
    "compute_dtype": "float32",
    "telemetry_every": 4,
    "save_every": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_llama(
        seed=3, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.15,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data():
    tokens = torch.randint(VOCABULARY, (1000,), generator=torch.Generator().manual_seed(1))
    return _core.TokenData.from_tensor(tokens, VOCABULARY)


def policy():
    return _core.Policy.from_json(json.dumps(POLICY))


def setup(folder):
    decoder = _core.load_model(folder).decoder
    teacher = decoder.frozen_copy(torch.float32)
    return _core.prepare_decoder(decoder, policy()), teacher


def parameters(prepared):
    return {name: value.detach().clone() for name, value in prepared.decoder.parameters().items()}


def plain_loop(folder, data, options):
    """The same training as an ordinary PyTorch program."""
    prepared, teacher = setup(folder)
    decoder = prepared.decoder
    decoder.set_trainable(True)
    latents = list(decoder.parameters().values())
    optimizer = torch.optim.AdamW(
        latents, betas=(options["beta1"], options["beta2"]), eps=options["epsilon"],
        weight_decay=options["weight_decay"],
    )  # fmt: skip
    losses = []
    for step in range(1, options["steps"] + 1):
        tokens = data.batch(step - 1, options["batch_size"], options["sequence_length"], options["seed"])
        with torch.no_grad():
            log_p = torch.log_softmax(teacher(tokens)[:, :-1], -1)
        log_q = torch.log_softmax(decoder(tokens)[:, :-1], -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        ce = torch.nn.functional.nll_loss(log_q.flatten(0, 1), tokens[:, 1:].flatten())
        loss = options["objective"]["kl"] * kl + options["objective"]["ce"] * ce
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(latents, options["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = _core.learning_rate_at(step, **options)
        optimizer.step()
        losses.append(loss.item())
    return losses, parameters(prepared)


def test_training_equals_a_plain_pytorch_loop(folder, data):
    options = _core.check_options(
        **OPTIONS, weight_decay=0.05, clip_norm=0.5, objective={"kl": 0.8, "ce": 0.2}
    )
    losses, expected = plain_loop(folder, data, options)
    prepared, teacher = setup(folder)
    reports = []
    assert _core.Trainer(prepared, teacher, data, **options).run(reports.append)
    assert reports[0].gradient_norm > 0.5
    # Two float32 programs whose sums run in other orders: 2^-24 per operation, amplified where Adam divides
    # by small moments, and by codes that flip.
    np.testing.assert_allclose([r.loss for r in reports], losses, rtol=2e-4)
    worst = max((value - expected[name]).abs().max().item() for name, value in parameters(prepared).items())
    assert worst < 0.1 * options["learning_rate"]
    start = parameters(setup(folder)[0])
    moved = max((value - start[name]).abs().max().item() for name, value in expected.items())
    assert moved > 3 * options["learning_rate"]


def test_a_tiny_decoder_learns_its_teacher_back(folder, data):
    prepared, teacher = setup(folder)
    held_out = torch.randint(VOCABULARY, (400,), generator=torch.Generator().manual_seed(2))
    before = _core.compare(teacher, [prepared], held_out)[1]
    options = dict(OPTIONS, steps=100, batch_size=8)
    assert _core.Trainer(prepared, teacher, data, **options).run()
    after = _core.compare(teacher, [prepared], held_out)[1]
    assert _core.share_removed(before.kl, after.kl) > 0.3
    grids = prepared.freeze().grids
    assert set(grids.values()) == {"int2_channel"}
    assert len(grids) == 14


def test_telemetry_and_progress(folder, data, tmp_path):
    prepared, teacher = setup(folder)
    trainer = _core.Trainer(prepared, teacher, data, tmp_path / "run", **OPTIONS, eval_every=4)
    trainer.set_evaluation(data.tokens()[:200], window=50)
    reports = []
    assert trainer.run(reports.append)
    lines = (tmp_path / "run/telemetry.jsonl").read_text().splitlines()
    assert lines == [report.to_json() for report in reports]
    parsed = [json.loads(line) for line in lines]
    assert [line["step"] for line in parsed] == list(range(1, 9))
    assert [("flip_rate" in line, "evaluation" in line) for line in parsed] == [
        (step % 4 == 0, step % 4 == 0) for step in range(1, 9)
    ]
    assert parsed[-1]["evaluation"]["student"]["kl"] == reports[-1].evaluation[1].kl
    assert 0 < parsed[-1]["distance_to_grid"] < 1
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["options"] == _core.check_options(**OPTIONS, eval_every=4)
    assert run["policy"] == json.loads(policy().to_json())
    assert "exp_avg/model.norm.weight" in load_file(tmp_path / "run/state.safetensors")


LEARNED = {**POLICY, "estimator": {"kind": "lsq"}}


def test_learned_scales_train_resume_and_ship(folder, data, tmp_path):
    options = dict(OPTIONS, scale_learning_rate=2e-2, ema=0.5, oscillation={"freeze_above": 0.4})

    def trainer(path):
        decoder = _core.load_model(folder).decoder
        teacher = decoder.frozen_copy(torch.float32)
        prepared = _core.prepare_decoder(decoder, _core.Policy.from_json(json.dumps(LEARNED)))
        return prepared, _core.Trainer(prepared, teacher, data, path, **options)

    whole, run = trainer(tmp_path / "whole")
    start = whole.freeze()
    reports = []
    assert run.run(reports.append)
    assert reports[-1].scale_drift > 1e-3
    assert 0 < reports[-1].clip_rate < 0.5
    assert reports[-1].dead_codes == {"int2_channel": 0}
    assert 0 < reports[-1].probe_kl < reports[-1].probe_kl_start
    assert reports[-1].oscillation >= 0
    assert run.warnings == []
    _, cut = trainer(tmp_path / "cut")
    assert not cut.run(lambda report: report.step < 5)
    again, cut = trainer(tmp_path / "cut")
    cut.resume()
    assert cut.run()
    states = [(tmp_path / name / "state.safetensors").read_bytes() for name in ("whole", "cut")]
    assert states[0] == states[1]
    shipped, resumed = whole.freeze(), again.freeze()
    name = "model.layers.0.mlp.up_proj.weight"
    assert shipped.quantized[name].scales.equal(resumed.quantized[name].scales)
    assert not shipped.quantized[name].scales.equal(start.quantized[name].scales)
    # The average ships, and the state keeps both.
    state = load_file(tmp_path / "whole/state.safetensors")
    assert parameters(whole)[name].equal(state[f"average/{name}"])
    assert not parameters(whole)[name].equal(state[f"latent/{name}"])
    assert shipped.quantized[name].scales.flatten().equal(state[f"average/{name}_scales"].flatten())


def test_frozen_parameters_stay(folder, data):
    prepared, teacher = setup(folder)
    before = parameters(prepared)
    _core.Trainer(prepared, teacher, data, **OPTIONS, frozen=["model\\.embed_tokens", ".*norm"]).run()
    changed = {name for name, value in parameters(prepared).items() if not value.equal(before[name])}
    assert changed == {name for name in before if "_proj" in name}


def uninterrupted(folder, data, path) -> bytes:
    prepared, teacher = setup(folder)
    assert _core.Trainer(prepared, teacher, data, path, **OPTIONS).run()
    return (path / "state.safetensors").read_bytes()


def resume(folder, data, path) -> bytes:
    prepared, teacher = setup(folder)
    trainer = _core.Trainer(prepared, teacher, data, path, **OPTIONS)
    trainer.resume()
    assert trainer.run()
    return (path / "state.safetensors").read_bytes()


def test_keyboard_interrupt_saves_and_raises(folder, data, tmp_path):
    prepared, teacher = setup(folder)
    trainer = _core.Trainer(prepared, teacher, data, tmp_path / "a", **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(lambda report: _thread.interrupt_main() if report.step == 4 else None)
    state = load_file(tmp_path / "a/state.safetensors")
    assert trainer.step in (4, 5)  # the signal is seen before or after the callback of the next step
    assert state["latent/model.norm.weight"].equal(parameters(prepared)["model.norm.weight"])
    assert resume(folder, data, tmp_path / "a") == uninterrupted(folder, data, tmp_path / "b")


def test_an_exception_in_progress_saves_and_is_raised(folder, data, tmp_path):
    prepared, teacher = setup(folder)
    trainer = _core.Trainer(prepared, teacher, data, tmp_path / "a", **OPTIONS)

    def progress(report):
        if report.step == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer.run(progress)
    assert trainer.step == 4
    assert trainer.run(lambda report: report.step < 6) is False
    assert trainer.step == 6
    assert resume(folder, data, tmp_path / "a") == uninterrupted(folder, data, tmp_path / "b")


KILLED = """
    import json, os, signal, sys
    import torch
    from libqat import _core
    folder, run, tokens, policy, options = sys.argv[1:]
    decoder = _core.load_model(folder).decoder
    teacher = decoder.frozen_copy(torch.float32)
    prepared = _core.prepare_decoder(decoder, _core.Policy.from_json(policy))
    trainer = _core.Trainer(prepared, teacher, _core.TokenData.open(tokens), run, **json.loads(options))
    trainer.run(lambda report: os.kill(os.getpid(), signal.SIGKILL) if report.step == 5 else None)
"""


def test_killed_and_resumed_ends_in_the_same_bytes(folder, data, tmp_path):
    _core.write_tokens(tmp_path / "text.tokens", data.tokens(), VOCABULARY)
    arguments = [folder, tmp_path / "a", tmp_path / "text.tokens", json.dumps(POLICY), json.dumps(OPTIONS)]
    environment = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, arguments)], env=environment
    )
    assert process.returncode == -signal.SIGKILL
    mapped = _core.TokenData.open(tmp_path / "text.tokens")
    assert resume(folder, mapped, tmp_path / "a") == uninterrupted(folder, data, tmp_path / "b")


def test_a_used_run_folder_is_refused(folder, data, tmp_path):
    uninterrupted(folder, data, tmp_path / "run")
    prepared, teacher = setup(folder)
    with pytest.raises(FileError, match="resume it, or choose another folder"):
        _core.Trainer(prepared, teacher, data, tmp_path / "run", **OPTIONS).run()
    with pytest.raises(FileError, match=r"learning_rate: expected 0\.1, got 0\.003"):
        _core.Trainer(prepared, teacher, data, tmp_path / "run", **dict(OPTIONS, learning_rate=0.1)).resume()


def test_a_python_teacher(folder, data):
    native, teacher = setup(folder)
    wrapped, other = setup(folder)
    _core.Trainer(native, teacher, data, **OPTIONS).run()
    _core.Trainer(wrapped, lambda tokens: other(tokens), data, **OPTIONS).run()
    assert all(value.equal(parameters(wrapped)[name]) for name, value in parameters(native).items())

    def broken(tokens):
        raise LookupError("teacher is out")

    with pytest.raises(LookupError, match="teacher is out"):
        _core.Trainer(setup(folder)[0], broken, data, **OPTIONS).run()


def test_options_and_errors(folder, data):
    prepared, teacher = setup(folder)
    assert set(_core.default_options()) >= set(OPTIONS) | {"objective", "frozen", "seed"}
    with pytest.raises(ArgumentError, match="learning_rat: expected one of steps"):
        _core.Trainer(prepared, teacher, data, learning_rat=1)
    with pytest.raises(ArgumentError, match="steps: expected an integer"):
        _core.Trainer(prepared, teacher, data, steps="many")
    for objective in [{}, {"kl": 0, "jsd": 1}]:
        with pytest.raises(ArgumentError, match="teacher"):
            _core.Trainer(prepared, None, data, **OPTIONS, objective=objective)
        assert _core.needs_teacher(objective=objective)
    assert not _core.needs_teacher(objective={"kl": 0, "ce": 1})
    with pytest.raises(ArgumentError, match="at least one window of 5000 tokens, got 1000"):
        _core.Trainer(prepared, teacher, data, **dict(OPTIONS, sequence_length=5000))
    with pytest.raises(ArgumentError, match=r"frozen\[0\]"):
        _core.Trainer(prepared, teacher, data, **OPTIONS, frozen=["no such parameter"])
    with pytest.raises(ArgumentError, match=r"in \[0, 4\), got 4"):
        _core.TokenData.from_tensor(torch.arange(5), 4)
