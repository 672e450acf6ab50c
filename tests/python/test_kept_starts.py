"""Starts that one run keeps and others take up."""

import json

import pytest
import torch
from command_line import run, works
from safetensors.torch import load_file, save_file

import libqat
from libqat import finetune, run_folder, starts

POLICY = {"rules": [{"match": r".*_proj", "weight": "q4_0"}, {"match": r".*embed.*", "weight": "q8_0"}]}
OPTIONS = {"steps": 3, "batch_size": 2, "sequence_length": 32}


@pytest.fixture
def tokens(hf_folder, text_file):
    return finetune.tokenize_files(hf_folder, [text_file], 32)


def test_a_kept_start_is_the_same_start(hf_folder, tokens, tmp_path):
    """The second run, which rounds nothing, ships the same bytes as the first."""
    kept = tmp_path / "kept" / "start.safetensors"
    seen = []
    first = finetune.start(hf_folder, tokens, POLICY, tmp_path / "a", save_start=kept, **OPTIONS)
    second = finetune.start(
        hf_folder,
        tokens,
        POLICY,
        tmp_path / "b",
        start=kept,
        on_start=lambda *now: seen.append(now),
        **OPTIONS,
    )
    assert not seen
    assert (second.start, second.calibration) == ("guided", first.calibration)
    assert first.train()
    assert second.train()
    assert first.checkpoint.read_bytes() == second.checkpoint.read_bytes()
    entries = [run_folder.read_finetune(tmp_path / name) for name in "ab"]
    assert entries[0]["start"] == entries[1]["start"] == "guided"
    assert entries[0]["calibration"] == entries[1]["calibration"] == {"text": 192, "generated": 192}
    options = [json.loads((tmp_path / name / "run.json").read_text())["options"] for name in "ab"]
    assert options[0] == options[1]


def test_a_run_from_a_kept_start_resumes(hf_folder, tokens, tmp_path):
    kept = tmp_path / "start.safetensors"
    whole = finetune.start(hf_folder, tokens, POLICY, tmp_path / "whole", save_start=kept, **OPTIONS)
    whole.train()
    part = finetune.start(hf_folder, tokens, POLICY, tmp_path / "part", start=kept, **OPTIONS)
    assert not part.train(lambda report: report.step < 2)
    kept.unlink()
    rest = finetune.start(hf_folder, tokens, POLICY, tmp_path / "part", start=kept, resume=True, **OPTIONS)
    assert rest.train()
    assert whole.checkpoint.read_bytes() == rest.checkpoint.read_bytes()
    assert run_folder.read_finetune(tmp_path / "part")["start"] == "guided"


def prepared_on(folder, policy=POLICY):
    loaded = libqat.load_model(folder)
    return libqat.prepare(
        loaded.decoder, libqat.recommended(libqat.Policy.from_json(json.dumps(policy))).policy
    )


def test_refusals(hf_folder, tokens, tmp_path):
    path = tmp_path / "start.safetensors"
    starts.save_start(prepared_on(hf_folder), starts.Start("guided", {"text": 1}), path)
    other = prepared_on(hf_folder)
    assert starts.load_start(other, path) == ("guided", {"text": 1})
    tensors, before = load_file(path), {k: v.clone() for k, v in other.decoder.parameters().items()}
    name = "model.layers.0.mlp.down_proj.weight"
    metadata = {"libqat_start": json.dumps({"method": "guided", "calibration": {}})}
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"{name}: expected float32 .*, got none"),
        (tensors | {"another": torch.zeros(2)}, r"another: expected none, got F32 \[2\]"),
        (tensors | {name: tensors[name][1:] + 1}, f"{name}: expected float32 .*, got F32"),
        (tensors | {name: tensors[name].half()}, f"{name}: expected float32 .*, got F16"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors", metadata)
        with pytest.raises(libqat.FileError, match=message):
            starts.load_start(other, tmp_path / "wrong.safetensors")
    for said in (
        None,
        {},
        {"libqat_start": "7"},
        {"libqat_start": '{"method": "x", "calibration": {"a": "b"}}'},
    ):
        save_file(tensors, tmp_path / "wrong.safetensors", said)
        with pytest.raises(libqat.FileError, match="libqat_start: expected metadata that save_start wrote"):
            starts.load_start(other, tmp_path / "wrong.safetensors")
    (tmp_path / "wrong.safetensors").write_bytes(path.read_bytes()[:-4])
    for bad in (tmp_path / "wrong.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(libqat.FileError, match=f"load_start: {bad}: expected what save_start wrote"):
            starts.load_start(other, bad)
    assert all(torch.equal(before[k], v) for k, v in other.decoder.parameters().items())
    with pytest.raises(libqat.ArgumentError, match=r"start: expected one of .* or a \*.safetensors file"):
        finetune.start(hf_folder, tokens, POLICY, tmp_path / "run", start="gpqt", **OPTIONS)
    with pytest.raises(libqat.ArgumentError, match="save_start: expected a start that can be kept"):
        finetune.start(hf_folder, tokens, POLICY, tmp_path / "run", start="none", save_start=path, **OPTIONS)
    unwritable = path / "below" / "start.safetensors"
    with pytest.raises(libqat.FileError, match=r"save_start: .*expected a writable file"):
        finetune.start(hf_folder, tokens, POLICY, tmp_path / "run", save_start=unwritable, **OPTIONS)


def test_the_command_line(hf_folder, text_file, tmp_path):
    kept = tmp_path / "start.safetensors"
    options = [hf_folder, "--text", text_file, "--steps", 2, "--sequence-length", 32]
    works("finetune", *options, "--save-start", kept, "--out", tmp_path / "a")
    code, _, err = run(
        "finetune", *options, "--start", kept, "--learning-rate", 1e-5, "--out", tmp_path / "b"
    )
    assert code == 0
    assert "starting from guided, calibrated on 128 tokens of its own too" in err
    works("finetune", *options, "--start", kept, "--out", tmp_path / "c")
    shipped = [(tmp_path / name / finetune.CHECKPOINT).read_bytes() for name in "abc"]
    assert shipped[0] == shipped[2] != shipped[1]
    plan = json.loads(
        works("finetune", *options, "--start", kept, "--out", tmp_path / "d", "--dry-run", "--json")
    )
    assert plan["start"] == str(kept)
