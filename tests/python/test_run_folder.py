"""finetune.json and evaluation.json: what they hold, and that they appear whole or not at all."""

import json
import os

import pytest
import torch

import libqat
from libqat import ArgumentError, FileError, finetune, run_folder

OPTIONS = {"steps": 2, "batch_size": 2, "sequence_length": 16}


@pytest.fixture
def run(hf_folder, tmp_path):
    tokens = torch.randint(320, (200,), generator=torch.Generator().manual_seed(0))

    def start(**changes):
        settings = {"policy": "gguf-q4_0", "text": ()} | OPTIONS | changes
        policy = settings.pop("policy")
        return finetune.start(hf_folder, tokens, policy, tmp_path / "run", **settings)

    return start


def test_training_records_where_the_run_came_from(run, hf_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = run(text=["a.txt", tmp_path / "b.txt"])
    assert not (tmp_path / "run").exists(), "start loads and checks, it writes nothing"

    def seen(report):
        if report.step == 1:  # a report may be made while the run goes on
            found.append(run_folder.read_finetune(tmp_path / "run"))

    found = []
    started.train(seen)
    assert found == [
        {
            "libqat": libqat.__version__,
            "model": os.path.abspath(hf_folder),
            "text": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
            "control": False,
            "start": "guided",
            "calibration": {"text": 64, "generated": 64},
        }
    ]
    assert run_folder.is_run_folder(tmp_path / "run")
    assert not run_folder.is_run_folder(hf_folder)
    trained = libqat.recommended(libqat.Policy.load("gguf-q4_0")).policy
    assert run_folder.read_policy(tmp_path / "run") == json.loads(trained.to_json())


def test_a_resumed_run_keeps_its_text_and_a_refused_one_changes_nothing(run, tmp_path):
    path = tmp_path / "run" / "finetune.json"
    run(text=["a.txt"]).train(lambda report: False)
    before = path.read_bytes()
    with pytest.raises(FileError, match="resume"):
        run(text=["other.txt"]).train()
    assert path.read_bytes() == before
    run(resume=True).train()
    assert path.read_bytes() == before


def test_the_control_is_marked(run, tmp_path):
    run(policy=finetune.FLOAT, objective={"kl": 0.0, "ce": 1.0}).train()
    assert run_folder.read_finetune(tmp_path / "run")["control"] is True


def text(name: str, ppl: float) -> dict:
    return {"name": name, "rows": [{"row": "float", "ppl": ppl}]}


def test_entries_are_replaced_by_name(tmp_path):
    (tmp_path / "model.qat.safetensors").write_bytes(b"first")
    first = {"models": [{"row": "float"}, {"row": "qat"}], "texts": [text("a", 1.0), text("b", 2.0)]}
    run_folder.merge_evaluation(tmp_path, first)
    merged = run_folder.merge_evaluation(
        tmp_path,
        {"texts": [text("b", 3.0), text("c", 4.0)], "metrics": [{"name": "m", "rows": []}]},
    )
    assert merged == run_folder.read_evaluation(tmp_path)
    assert merged["format"] == 1
    assert merged["texts"] == [text("a", 1.0), text("b", 3.0), text("c", 4.0)]
    assert [entry["row"] for entry in merged["models"]] == ["float", "qat"]
    assert [entry["name"] for entry in merged["metrics"]] == ["m"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "model.qat.safetensors"]


def test_another_checkpoint_makes_earlier_entries_void(tmp_path):
    (tmp_path / "model.qat.safetensors").write_bytes(b"first")
    run_folder.merge_evaluation(tmp_path, {"texts": [text("a", 1.0)]})
    (tmp_path / "model.qat.safetensors").write_bytes(b"second")
    merged = run_folder.merge_evaluation(tmp_path, {"texts": [text("b", 2.0)]})
    assert merged["texts"] == [text("b", 2.0)]


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "x.json"
    run_folder.write_json(path, {"a": "ü"})
    with pytest.raises(ValueError, match="JSON"):
        run_folder.write_json(path, {"a": float("nan")})
    with pytest.raises(FileError, match=r"no/x\.json"):
        run_folder.write_json(tmp_path / "no" / "x.json", {})
    assert run_folder.read_json(path) == {"a": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "expected JSON"),
        (b"\xff", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[]", "JSON object, got list"),
        (b'{"format": 2}', "format: expected 1, got 2"),
        (b'{"format": 1, "models": {}}', "models: expected a list"),
        (b'{"format": 1, "models": [{"name": "a"}]}', r"models\[0\]\.row"),
    ],
)
def test_malformed_files_are_named(content, says, tmp_path):
    (tmp_path / "evaluation.json").write_bytes(content)
    with pytest.raises(FileError, match=says) as error:
        run_folder.read_evaluation(tmp_path)
    assert "evaluation.json" in str(error.value)


def test_a_folder_without_what_is_needed(tmp_path):
    with pytest.raises(FileError, match=r"model\.qat\.safetensors"):
        run_folder.merge_evaluation(tmp_path, {})
    with pytest.raises(FileError, match=r"finetune\.json"):
        run_folder.read_finetune(tmp_path)
    (tmp_path / "finetune.json").write_text('{"libqat": "1", "model": 3}')
    with pytest.raises(FileError, match="model: expected str, got 3"):
        run_folder.read_finetune(tmp_path)
    entry = {"libqat": "1", "model": "m", "text": [], "control": False}
    (tmp_path / "finetune.json").write_text(json.dumps(entry))
    assert run_folder.read_finetune(tmp_path)["calibration"] == {}
    (tmp_path / "finetune.json").write_text(json.dumps(entry | {"calibration": [7]}))
    with pytest.raises(FileError, match=r"calibration: expected dict, got \[7\]"):
        run_folder.read_finetune(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileError, match="policy"):
        run_folder.read_policy(tmp_path)
    assert issubclass(FileError, libqat.Error)
    assert not issubclass(FileError, ArgumentError)
