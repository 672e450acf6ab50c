"""What programs and shells need of the command line: JSON, plain text in pipes, plans, completion."""

import json
import os
import subprocess
import sys

import pytest
import torch
from command_line import ENVIRONMENT, QUICK, run, start, works
from libqat.dry_run import dry_run

import libqat


def test_dry_run_says_what_would_be_trained_and_writes_nothing(hf_folder, text_file, tmp_path):
    out = tmp_path / "run"
    arguments = ["finetune", hf_folder, "--text", text_file, "--out", out, *QUICK, "--dry-run"]
    plan = json.loads(works(*arguments, "--json"))
    assert not out.exists()
    prepared = libqat.prepare(libqat.load_model(hf_folder).decoder, "gguf-q4_0")
    report = prepared.report()
    assert plan["bytes"] == report.bytes
    assert plan["weights"] == report.weights
    assert sum(grid["bytes"] for grid in plan["grids"].values()) == plan["bytes"]
    untrained = [tensor["name"] for tensor in plan["tensors"] if not tensor["trained"]]
    assert untrained == ["model.embed_tokens.weight"]
    assert plan["trained_weights"] == plan["weights"] - 320 * 64
    assert plan["memory"]["moments"] == 2 * 4 * plan["trained_weights"]
    assert plan["memory"]["peak"] > plan["memory"]["latents"]
    assert plan["tokens"]["per_step"] == 2 * 16
    assert plan["tokens"]["run"] == 3 * 2 * 16
    assert plan["tokens"]["epochs"] == pytest.approx(96 / plan["tokens"]["text"])
    assert plan["time"]["seconds"] == pytest.approx(3 * plan["time"]["seconds_per_step"])

    said = works(*arguments)
    assert "trained: 74,048 of 94,528 weights" in said
    assert "q4_0" in said
    assert not out.exists()


def test_a_plan_of_a_single_step(hf_folder):
    tokens = torch.arange(64) % 320
    plan = dry_run(hf_folder, tokens, "gguf-q4_0", steps=1, batch_size=1, sequence_length=16)
    assert plan["time"]["seconds"] == plan["time"]["seconds_per_step"] > 0
    assert plan["tokens"]["run"] == 16


def test_a_plan_refuses_what_the_run_would_refuse(hf_folder):
    with pytest.raises(libqat.ArgumentError, match="learning_rate"):
        dry_run(hf_folder, torch.arange(64), "gguf-q4_0", learning_rate=-1.0)


def test_finetune_and_quantize_report_in_json(hf_folder, text_file, tmp_path):
    folder = tmp_path / "run"
    arguments = ["finetune", hf_folder, "--text", text_file, "--out", folder, *QUICK, "--json"]
    outcome = json.loads(works(*arguments))
    last = json.loads((folder / "telemetry.jsonl").read_text().splitlines()[-1])
    assert outcome["loss"] == last["loss"]
    assert outcome["steps"] == 3
    assert outcome["bytes"] == (folder / "model.qat.safetensors").stat().st_size
    finished = json.loads(works(*arguments, "--resume"))
    assert (finished["steps"], finished["loss"]) == (3, None)

    path = tmp_path / "rtn.qat.safetensors"
    rounded = json.loads(works("quantize", hf_folder, "--out", path, "--json"))
    assert rounded["checkpoint"] == str(path)
    assert rounded["bytes"] == path.stat().st_size
    by_name = {tensor["name"]: tensor for tensor in rounded["tensors"]}
    assert by_name["model.embed_tokens.weight"]["grid"] == "q8_0"
    assert by_name["model.norm.weight"]["relative_error"] == 0

    gguf = tmp_path / "rtn.gguf"
    exported = json.loads(works("export", path, gguf, "--json"))
    assert exported == {"file": str(gguf), "target": "gguf", "bytes": gguf.stat().st_size}


@pytest.mark.parametrize("command", ["finetune", "quantize", "export", "eval", "inspect", "verify"])
def test_every_command_speaks_json(command):
    assert "--json" in works(command, "--help")


def test_a_pipe_gets_no_colours(hf_folder, tmp_path):
    environment = {**ENVIRONMENT, "TERM": "xterm-256color"}
    for arguments in (["inspect", hf_folder / "model.safetensors"], ["--help"]):
        process = start(*arguments, stdin=subprocess.DEVNULL)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "\x1b" not in out + err
    forced = subprocess.run(
        [sys.executable, "-m", "libqat", "inspect", hf_folder / "model.safetensors"],
        capture_output=True,
        text=True,
        env={**environment, "FORCE_COLOR": "1"},
    )
    assert "\x1b" in forced.stdout, "the colours that a pipe must not get by itself"


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("libqat fi", "finetune"),
        ("libqat finetune model --policy gguf", "gguf-q4_0"),
        ("libqat quantize model --policy m", "mine.json"),
    ],
)
def test_the_shell_completes(words, offers, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    completion = {"_LIBQAT_COMPLETE": "complete_bash"}
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'libqat'; from libqat.cli import main; main()"],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, **completion, **asked},
        cwd=tmp_path,
    )
    assert offers in done.stdout.split(), done.stderr


def test_the_help_tells_the_exit_codes():
    said = " ".join(works("--help").split())
    assert "Exit codes: 0 done, 1 an error or a difference found, 2 wrong usage, 130 interrupted" in said
    assert run("finetune", "--no-such-option")[0] == 2


def test_policies_are_listed_and_printed_ready_to_be_changed(tmp_path):
    listed = works("policies")
    for name in libqat.Policy.presets():
        assert name in listed
        text = works("policies", name)
        assert libqat.Policy.from_json(text) == libqat.Policy.preset(name)
        assert text.count("\n") >= 4  # a rule a line, not one long line
    found = json.loads(works("policies", "--json"))
    assert [entry["name"] for entry in found] == libqat.Policy.presets()
    assert found[0]["policy"] == json.loads(libqat.Policy.preset(found[0]["name"]).to_json())
    code, _, said = run("policies", "gguf-q4")
    assert code == 1
    assert "expected one of gguf-q4_0" in said
