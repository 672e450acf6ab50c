"""The command line: what it writes, and what it says about bad input."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import libqat
from libqat import cli

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": str(Path(libqat.__file__).parents[1]),
}
QUICK = ["--steps", "3", "--sequence-length", "16", "--batch-size", "2"]


def start(*arguments, **options):
    """`libqat` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "libqat", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def run(*arguments, **options):
    """Exit code, standard output and standard error; in this process unless `options` want another."""
    if options:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["libqat", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": "120"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit,
    ):
        cli.main()
    return exit.value.code, out.getvalue(), err.getvalue()


def works(*arguments, **options):
    code, out, err = run(*arguments, **options)
    assert code == 0, err
    return out


def fails(*arguments, says, **options):
    """Exit code 1, one error line that holds each of `says`, and no traceback."""
    code, out, err = run(*arguments, **options)
    assert code == 1, (out, err)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    assert "LIBQAT_DEBUG" not in err, "an error of a kind that users should never see"
    for expected in [says] if isinstance(says, str) else says:
        assert expected in errors[0], errors[0]


@pytest.fixture(scope="module")
def ckpt(hf_folder, tmp_path_factory):
    """A checkpoint of the tiny model, rounded without training."""
    path = tmp_path_factory.mktemp("ckpt") / "rtn.qat.safetensors"
    loaded = libqat.load_model(hf_folder)
    prepared = libqat.prepare(loaded.decoder, "gguf-q4_0")
    libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), path)
    return path


@pytest.fixture(scope="module")
def gguf(ckpt):
    path = ckpt.with_name("rtn.gguf")
    libqat.export(libqat.load(ckpt), path)
    return path


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


def test_quantize_reports_and_equals_python(hf_folder, ckpt, tmp_path):
    path = tmp_path / "rtn.qat.safetensors"
    out = works("quantize", hf_folder, "--out", path, "--report")
    assert "model.layers.1.mlp.down_proj.weight" in out
    assert path.read_bytes() == ckpt.read_bytes()


def test_quantize_with_searched_scales(hf_folder, ckpt, tmp_path):
    path = tmp_path / "search.qat.safetensors"
    works("quantize", hf_folder, "--method", "search", "--out", path)
    loaded = libqat.load_model(hf_folder)
    prepared = libqat.prepare(loaded.decoder, libqat.Policy.preset("gguf-q4_0").with_scale("search"))
    expected = libqat.dequantize(libqat.freeze(prepared, loaded.config, loaded.tokenizer))
    weights = libqat.dequantize(libqat.load(path))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert libqat.Policy.from_json(libqat.load(path).policy).scale == "search"
    works("quantize", hf_folder, "--method", "rtn", "--out", path)
    assert path.read_bytes() == ckpt.read_bytes()
    code, _, err = run("quantize", hf_folder, "--method", "best")
    assert code == 2
    assert "'rtn', 'search'" in err


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


# ---- bad input


def test_missing_files(hf_folder, text_file, ckpt, tmp_path):
    gone = tmp_path / "gone"
    fails("quantize", gone, says=str(gone))
    fails("export", gone, tmp_path / "x.gguf", says=str(gone))
    fails("inspect", gone, says=str(gone))
    fails("verify", gone, "--against", ckpt, says=str(gone))
    fails("finetune", hf_folder, "--text", gone, "--out", tmp_path / "run", says=str(gone))
    fails(
        "finetune",
        hf_folder,
        "--text",
        text_file,
        "--policy",
        f"{gone}.json",
        "--out",
        gone,
        says=f"{gone}.json",
    )
    fails("finetune", hf_folder, "--text", text_file, "--out", tmp_path / "run", "--resume", says="run")
    assert list(tmp_path.iterdir()) == [] or [p.name for p in tmp_path.iterdir()] == ["run"]


def broken(path: Path, target: Path, change) -> Path:
    target.write_bytes(change(path.read_bytes()))
    return target


@pytest.mark.parametrize("change", ["truncated", "garbage", "empty"])
def test_malformed_files(change, hf_folder, ckpt, gguf, tmp_path):
    spoil = {
        "truncated": lambda content: content[: len(content) * 2 // 3],
        "garbage": lambda content: content[:4] + b"\xff" * 8 + content[12:],
        "empty": lambda content: b"",
    }[change]
    bad_gguf = broken(gguf, tmp_path / "bad.gguf", spoil)
    bad_ckpt = broken(ckpt, tmp_path / "bad.qat.safetensors", spoil)
    model = tmp_path / "model"
    shutil.copytree(hf_folder, model)
    bad_weights = broken(hf_folder / "model.safetensors", model / "model.safetensors", spoil)
    fails("quantize", bad_gguf, says="bad.gguf")
    fails("inspect", bad_gguf, says="bad.gguf")
    fails("export", bad_ckpt, tmp_path / "x.gguf", says="bad.qat.safetensors")
    fails("verify", bad_gguf, "--against", ckpt, says="bad.gguf")
    fails("quantize", model, says=str(bad_weights))
    assert not (tmp_path / "x.gguf").exists()


def test_wrong_dtype_in_a_model(hf_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(hf_folder, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    fails("quantize", model, "--out", tmp_path / "x.qat.safetensors", says=["model.norm.weight", "I32"])
    assert not (tmp_path / "x.qat.safetensors").exists()


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"rules": [{"match": ".*", "weight": "q4_9"}]}, ["rules[0].weight", "q4_9"]),
        ({"rules": [{"match": ".*", "weight": "q4_0", "bits": 4}]}, ["rules[0]", "bits"]),
        ({"rules": [{"match": "nothing_here", "weight": "q4_0"}]}, ["rules[0]", "nothing_here"]),
        ({"rules": [{"match": "(", "weight": "q4_0"}]}, ["rules[0].match"]),
    ],
)
def test_bad_policies(policy, says, hf_folder, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    fails("quantize", hf_folder, "--policy", path, "--out", tmp_path / "x.safetensors", says=says)


def test_width_that_does_not_divide(tmp_path):
    from conftest import make_llama

    make_llama(hidden_size=48, intermediate_size=96, num_attention_heads=2, head_dim=32).save_pretrained(
        tmp_path
    )
    fails("quantize", tmp_path, "--out", tmp_path / "x", says=["model.embed_tokens.weight", "32", "48"])


def test_empty_text(hf_folder, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text("\n")
    fails("finetune", hf_folder, "--text", text, "--out", tmp_path / "run", says=["empty.txt", "empty"])
    fails("eval", hf_folder, "--reference", hf_folder, "--text", text, says="empty.txt")
    assert not (tmp_path / "run").exists()


def test_text_shorter_than_a_sequence(hf_folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("A few words.")
    fails("finetune", hf_folder, "--text", text, "--out", tmp_path / "run", says="256")


def test_token_ids_beyond_the_vocabulary(hf_folder, text_file, tmp_path):
    """A tokenizer that belongs to another model."""
    from tokenizers import Tokenizer

    model = tmp_path / "model"
    shutil.copytree(hf_folder, model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens(["the", "of"])
    tokenizer.save(str(model / "tokenizer.json"))
    fails("finetune", model, "--text", text_file, "--out", tmp_path / "run", says=["320", "token"])
    fails("eval", model, "--reference", model, "--text", text_file, says="320")


def test_bad_options(hf_folder, text_file, tmp_path):
    command = ["finetune", hf_folder, "--text", text_file, "--out", tmp_path / "run"]
    fails(*command, "--steps", 0, says=["steps", "0"])
    fails(*command, "--learning-rate", -1, says="learning_rate")
    fails(*command, "--frozen", "no_such_parameter", says="no_such_parameter")


def test_a_second_run_does_not_overwrite_the_first(hf_folder, text_file, tmp_path):
    command = ["finetune", hf_folder, "--text", text_file, "--out", tmp_path, *QUICK]
    works(*command)
    before = (tmp_path / "model.qat.safetensors").read_bytes()
    fails(*command, "--seed", 1, says="resume")
    assert (tmp_path / "model.qat.safetensors").read_bytes() == before


def test_a_checkpoint_without_a_tokenizer_offers_the_option(hf_folder, tmp_path):
    loaded = libqat.load_model(hf_folder)
    bare = tmp_path / "bare.qat.safetensors"
    libqat.save(libqat.freeze(libqat.prepare(loaded.decoder, "gguf-q4_0"), loaded.config), bare)
    fails("export", bare, tmp_path / "x.gguf", says="tokenizer_from")
    works("export", bare, tmp_path / "x.gguf", "--tokenizer-from", hf_folder)


def limit_file_size():
    """Writing beyond 16 KiB then fails in this process, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))


def test_a_full_disk_leaves_the_earlier_file(hf_folder, ckpt, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"earlier")
    fails("export", ckpt, path, says="model.gguf", preexec_fn=limit_file_size)
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]

    target = tmp_path / "x.qat.safetensors"
    target.write_bytes(b"earlier")
    fails("quantize", hf_folder, "--out", target, says="x.qat.safetensors", preexec_fn=limit_file_size)
    assert target.read_bytes() == b"earlier"


def test_a_folder_as_the_output(ckpt, tmp_path):
    fails("export", ckpt, tmp_path, says=str(tmp_path))
    fails("export", ckpt, tmp_path / "no" / "folder.gguf", says="folder.gguf")


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


def test_a_huge_header_is_refused(tmp_path):
    """Counts in a header are never trusted."""
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    fails("inspect", path, says="huge.safetensors")
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 61, 1 << 61))
    fails("inspect", path, says="huge.gguf")


def test_a_process_of_its_own(ckpt, tmp_path):
    """Everything else runs in this process; the entry point and the exit codes are seen from outside here."""
    code, out, _ = run("inspect", ckpt, "--json", cwd=tmp_path)
    assert code == 0
    assert json.loads(out)["format"] == "libqat checkpoint"
    fails("inspect", tmp_path / "gone", says="gone", cwd=tmp_path)
