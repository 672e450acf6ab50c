"""The command line: what it writes."""

import json
import re
import signal
import subprocess
import sys
from unittest import mock

import pytest
from command_line import ENVIRONMENT, QUICK, fails, run, works

import libqat
from libqat import cli

# ---- the whole way


def test_finetune_export_verify_eval_inspect(hf_folder, text_file, tmp_path):
    folder = tmp_path / "run"
    works("finetune", hf_folder, "--text", text_file, "--out", folder, *QUICK)
    trained, exported = folder / "model.qat.safetensors", tmp_path / "model.gguf"
    works("export", trained, exported)
    assert "exactly" in works("verify", exported, "--against", trained)

    options = ["--text", text_file, "--tokens", 600, "--json"]
    found = json.loads(works("eval", trained, exported, "--reference", hf_folder, *options))
    reference, ours, theirs = found["texts"][0]["rows"]
    assert [reference["row"], ours["row"], theirs["row"]] == ["float", str(trained), str(exported)]
    assert (reference["kl"], reference["top1"]) == (0, 1)
    assert ours["kl"] > 0
    assert {**theirs, "row": ""} == {**ours, "row": ""}, "the file holds the checkpoint's numbers"

    found = json.loads(works("inspect", exported, "--json"))
    grids = {tensor["name"]: tensor["grid"] for tensor in found["tensors"]}
    assert grids["blk.0.ffn_down.weight"] == "q4_0"
    assert grids["token_embd.weight"] == "q8_0"


def test_control_quantizes_nothing(hf_folder, text_file, tmp_path):
    works(
        "finetune",
        hf_folder,
        "--text",
        text_file,
        "--out",
        tmp_path,
        *QUICK,
        "--control",
        "--objective",
        "ce",
    )
    assert libqat.load(tmp_path / "model.qat.safetensors").grids == {}


def test_options_from_a_file_and_from_the_command_line(hf_folder, text_file, tmp_path):
    more = {
        "ema": 0.5,
        "steps": 7,
        "objective": {"kl": 0.5, "jsd": 0.5},
        "oscillation": {"freeze_above": 0.3},
    }
    (tmp_path / "more.json").write_text(json.dumps(more))
    command = ["finetune", hf_folder, "--text", text_file, *QUICK, "--options", tmp_path / "more.json"]
    works(*command, "--out", tmp_path / "a")
    found = json.loads((tmp_path / "a/run.json").read_text())["options"]
    assert (found["ema"], found["steps"], found["oscillation"]["freeze_above"]) == (0.5, 3, 0.3)
    assert (found["objective"]["kl"], found["objective"]["jsd"], found["objective"]["ce"]) == (0.5, 0.5, 0)
    said = ["--objective", "cakld", "--temperature", 2, "--ema", 0, "--scale-learning-rate", 0.01]
    works(*command, "--out", tmp_path / "b", *said)
    found = json.loads((tmp_path / "b/run.json").read_text())["options"]
    assert (found["ema"], found["scale_learning_rate"]) == (0, 0.01)
    assert found["objective"] == libqat.default_options()["objective"] | {
        "kl": 0, "cakld": 1, "temperature": 2,
    }  # fmt: skip
    (tmp_path / "more.json").write_text('{"learning_rat": 1}')
    fails(*command, "--out", tmp_path / "c", says=["learning_rat", "unknown key"])
    (tmp_path / "more.json").write_text("[1]")
    fails(*command, "--out", tmp_path / "c", says=["more.json", "a JSON object"])


def test_a_run_that_made_it_worse_is_warned_about(hf_folder, text_file, tmp_path):
    command = ["finetune", hf_folder, "--text", text_file, "--steps", 10, "--sequence-length", 16, "--json"]
    code, out, err = run(*command, "--out", tmp_path / "wild", "--learning-rate", 1)
    assert code == 0
    [warning] = json.loads(out)["warnings"]
    assert f"warning: {warning}" in err
    assert "training made the model worse" in warning
    assert "learning rate is too high" in warning


def test_verify_lists_differences(hf_folder, gguf, ckpt, tmp_path):
    other = tmp_path / "other.qat.safetensors"
    works("quantize", hf_folder, "--policy", "gguf-q8_0", "--out", other)
    code, out, err = run("verify", gguf, "--against", other)
    assert code == 1
    assert "model.layers.0.mlp.down_proj.weight" in out
    assert "differences" in err
    code, out, _ = run("verify", gguf, "--against", other, "--json")
    assert code == 1
    assert {"tensor", "what", "count", "first"} == set(json.loads(out)[0])


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "gguf"])
def test_inspect_totals(kind, hf_folder, ckpt, gguf):
    path = {"checkpoint": ckpt, "safetensors": hf_folder / "model.safetensors", "gguf": gguf}[kind]
    out = works("inspect", path, "--no-tensors")
    # 14 matrices of 73,728 weights, 5 norms of 64, an embedding of 320 x 64; 4.5 and 8.5 bits
    size = 94528 * 4 if kind == "safetensors" else 73728 * 18 // 32 + 320 * 64 * 34 // 32 + 5 * 64 * 4
    assert f"{size:,}" in out
    assert "94,528" in out


def test_an_interrupted_run_goes_on_bit_for_bit(hf_folder, text_file, tmp_path):
    options = ["--steps", 6, "--sequence-length", 16]
    command = ["finetune", hf_folder, "--text", text_file, *options, "--out"]
    works(*command, tmp_path / "whole")

    def press_ctrl_c(report):
        if report.step == 3:
            signal.raise_signal(signal.SIGINT)
        return ""

    with mock.patch.object(cli.console, "describe", press_ctrl_c):
        code, _, err = run(*command, tmp_path / "cut")
    assert code == 130, err
    assert "interrupted at step 3 of 6" in err
    arguments = err.splitlines()[-1].split()
    assert arguments[0] == "libqat"
    assert arguments[-1] == "--resume"
    assert not (tmp_path / "cut" / "model.qat.safetensors").exists()

    works(*arguments[1:])
    whole, cut = (tmp_path / name / "model.qat.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


# ---- help and usage


def test_help_teaches_by_an_example_per_command():
    names = re.findall(r"^│ (\w[\w-]*) ", works("--help"), re.M)
    commands = [name for name in names if name.islower()]
    expected = "convert eval export fetch finetune inspect plan-memory policies quantize report size verify"
    assert sorted(commands) == expected.split()
    for command in commands:
        assert f"Example: libqat {command}" in re.sub(r"\s+", " ", works(command, "--help"))


@pytest.mark.parametrize("arguments", [["nonsense"], ["export"], ["finetune", "m", "--objective", "mse"]])
def test_wrong_usage_is_code_2(arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "libqat", "inspect", str(tmp_path / "gone")],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "LIBQAT_DEBUG": "1"},
        check=False,
    )
    assert process.returncode == 1
    assert "Traceback" in process.stderr


def test_a_process_of_its_own(ckpt, tmp_path):
    """Everything else runs in this process; the entry point and the exit codes are seen from outside here."""
    code, out, _ = run("inspect", ckpt, "--json", cwd=tmp_path)
    assert code == 0
    assert json.loads(out)["format"] == "libqat checkpoint"
    fails("inspect", tmp_path / "gone", says="gone", cwd=tmp_path)
