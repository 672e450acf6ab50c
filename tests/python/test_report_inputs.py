"""What the report reads: broken and unfinished runs, the command that repeats a run, and its remarks."""

import dataclasses
import json
import shlex

import pytest
import torch
from libqat.cli import main
from libqat.html_report import findings, inputs, reproduce
from libqat.html_report.evaluation import parse_evaluation
from safetensors.torch import load_file, save_file

import libqat
from libqat import ArgumentError, FileError, html_report

pytest_plugins = ["reporting"]


def spoil(path, change):
    """Applies `change` to a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- broken runs


@pytest.mark.parametrize(
    "name", ["run.json", "telemetry.jsonl", "state.safetensors", "model.qat.safetensors"]
)
def test_a_missing_file_is_named(name, run_copy):
    (run_copy / name).unlink()
    with pytest.raises(FileError, match=name):
        libqat.write_report(run_copy)
    assert not (run_copy / "report.html").exists()


def test_an_unfinished_run_says_how_to_finish(run_copy):
    (run_copy / "model.qat.safetensors").unlink()
    with pytest.raises(FileError, match=r"finished run.*--resume"):
        libqat.write_report(run_copy)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\n", "readable text"),
        (b'{"step": 1}\n{"step": 2, "loss"\n', "line 2: expected JSON"),
        (b'{"step": 1}\n\n[1]\n', "line 3: content: expected an object"),
        (b'{"step": -1}\n', "line 1: step: expected a whole number, got -1"),
        (b'{"step": true}\n', "line 1: step: expected a whole number, got true"),
        (b'{"loss": 1}\n', "line 1: step: expected a whole number, got nothing"),
        (b'{"step": 1, "loss": "low"}\n', 'line 1: loss: expected a number, got "low"'),
        (b'{"step": 1, "evaluation": {"student": {"nll": 1, "kl": 1}}}\n', "student.top1: expected a number"),
        (b"[" * 100_000, "line 1: expected JSON"),
    ],
)
def test_broken_telemetry(content, says, tmp_path):
    path = tmp_path / "telemetry.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileError) as error:
        inputs.read_telemetry(path)
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_telemetry_without_values_is_no_error(tmp_path):
    """A loss of NaN is left out of the curves; the trainer itself refuses to go on from it."""
    path = tmp_path / "telemetry.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "gradient_norm": null}\n{"step": 2, "loss": 2}\n')
    assert inputs.read_telemetry(path) == [{"step": 1}, {"step": 2, "loss": 2.0}]


BROKEN = {
    "texts[0].rows: expected a list, got 3": lambda d: d["texts"][0].update(rows=3),
    'texts[0].rows[1].kl: expected a number, got "x"': lambda d: d["texts"][0]["rows"][1].update(kl="x"),
    "rows[1].kl_interval: expected [low, high], got [1]": lambda d: d["texts"][0]["rows"][1].update(
        kl_interval=[1]
    ),
    "kl_removed_interval: expected [low, high]": lambda d: d["texts"][0].update(kl_removed_interval=["a", 2]),
    "texts[0].tokens: expected a whole number, got nothing": lambda d: d["texts"][0].pop("tokens"),
    "choices[1]": lambda d: d["choices"].append(7),
    "metrics[0].rows[0].row: expected text": lambda d: d["metrics"][0].update(rows=[{"value": 1}]),
    "models[0].bytes: expected a whole number, got -1": lambda d: d["models"][0].update(bytes=-1),
    "models[0].bits_per_weight: expected a number": lambda d: d["models"][0].update(bits_per_weight=None),
    "format: expected 1, got 2": lambda d: d.update(format=2),
}


@pytest.mark.parametrize("says", BROKEN)
def test_broken_evaluations(says, run_copy):
    spoil(run_copy / "evaluation.json", BROKEN[says])
    with pytest.raises(FileError) as error:
        libqat.write_report(run_copy)
    assert "evaluation.json" in str(error.value)
    assert says in str(error.value)


def test_scores_that_do_not_exist_are_dashes(report_data, evaluation):
    """The KL removed of a policy that costs nothing is no number."""
    document = evaluation()
    document["texts"][0] |= {"kl_removed": None, "kl_removed_interval": None, "nll_removed": float("nan")}
    for row in document["texts"][0]["rows"]:
        row |= {"kl": None, "kl_interval": [None, None]}
    data = dataclasses.replace(report_data, evaluation=parse_evaluation(document, "evaluation"))
    page = html_report.render(data)
    assert "not measured yet" in page
    assert "nan" not in page


def test_broken_settings(run_copy):
    spoil(run_copy / "run.json", lambda run: run["options"].update(steps=0))
    with pytest.raises(ArgumentError, match="steps"):
        libqat.write_report(run_copy)
    (run_copy / "run.json").write_text("{}")
    with pytest.raises(FileError, match=r"run\.json: options: expected an object"):
        libqat.write_report(run_copy)


def test_another_model(run_copy, hf_folder, tmp_path):
    from conftest import make_llama

    make_llama(num_hidden_layers=1).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ArgumentError, match=r"model\.layers\.1\.\S+ is only in the checkpoint"):
        libqat.write_report(run_copy, model=tmp_path / "smaller")
    make_llama(intermediate_size=64).save_pretrained(tmp_path / "narrower")
    with pytest.raises(ArgumentError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight: expected \[64, 64\]"):
        libqat.write_report(run_copy, model=tmp_path / "narrower")


def test_a_state_of_other_shapes(run_copy):
    state = load_file(run_copy / "state.safetensors")
    state["latent/model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(state, run_copy / "state.safetensors")
    with pytest.raises(
        ArgumentError, match=r"layers\.0\.mlp\.up_proj\.weight: expected \[128, 64\].*\[3, 3\]"
    ):
        libqat.write_report(run_copy)
    (run_copy / "state.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(FileError, match=r"state\.safetensors: expected a safetensors file"):
        libqat.write_report(run_copy)


def test_a_failure_leaves_the_earlier_page(run_copy, tmp_path):
    page = run_copy / "report.html"
    page.write_text("earlier")
    (run_copy / "telemetry.jsonl").write_text("?")
    with pytest.raises(FileError):
        libqat.write_report(run_copy)
    assert page.read_text() == "earlier"
    with pytest.raises(FileError, match=r"no/folder/x\.html: expected a writable file"):
        html_report.save_page("x", tmp_path / "no" / "folder" / "x.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileError, match="taken: expected a writable file"):
        html_report.save_page("x", tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]


# ---- the command


def test_the_command_repeats_the_run(run_copy, tmp_path, monkeypatch):
    """As the page shows it, word for word: the same settings, the same losses."""
    command = html_report.gather_run(run_copy).command
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:2] == ["libqat", "finetune"]
    monkeypatch.setattr("sys.argv", [*words[:-1], "again"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    ours, theirs = (
        json.loads((folder / "run.json").read_text()) for folder in (run_copy, tmp_path / "again")
    )
    for name in reproduce.BOOKKEEPING:
        theirs["options"][name] = ours["options"][name]
    assert ours == theirs


def test_a_run_that_no_command_can_say_is_python(run_copy):
    spoil(run_copy / "run.json", lambda run: run["options"].update(weight_decay=0.1))
    command = reproduce.command_of(inputs.read_run(run_copy))
    compile(command, "command", "exec")
    assert "weight_decay=0.1," in command
    assert "finetune.tokenize_files(" in command
    spoil(run_copy / "finetune.json", lambda started: started.update(text=[]))
    command = reproduce.command_of(inputs.read_run(run_copy))
    compile(command, "command", "exec")
    assert "TOKENS" in command


def test_a_policy_of_the_users_own_is_shown(run_copy):
    policy = {
        "rules": [{"match": ".*_proj", "weight": "q4_0"}, {"match": ".*embed_tokens", "weight": "q8_0"}]
    }
    spoil(run_copy / "run.json", lambda run: run.update(policy=policy))
    data = html_report.gather_run(run_copy)
    assert data.policy_name == ""
    assert "--policy policy.json" in data.command
    assert json.loads(data.policy) == policy
    assert "save it as <code>policy.json</code>" in html_report.render(data)


def test_names_are_quoted_for_the_shell(run_copy):
    spoil(run_copy / "finetune.json", lambda started: started.update(text=["/texts/a b; rm -rf $HOME"]))
    words = shlex.split(reproduce.command_of(inputs.read_run(run_copy)).replace("\\\n", ""))
    assert words[words.index("--text") + 1] == "/texts/a b; rm -rf $HOME"


# ---- the remarks


def remarks(data, **changes):
    found = findings.findings(dataclasses.replace(data, **changes))
    return {(finding.level, finding.section) for finding in found}, " ".join(f.text for f in found)


def losses(values):
    return [{"step": step, "loss": value, "gradient_norm": 1.0} for step, value in enumerate(values, 1)]


def changed(data, **fields):
    """The data with these fields in its second tensor, which is trained and on a small grid."""
    rows = list(data.tensors)
    rows[1] = dataclasses.replace(rows[1], **fields)
    assert rows[1].trained
    return {"tensors": rows}


def test_a_run_without_faults(report_data):
    levels, text = remarks(report_data, steps=losses([3, 2, 1.5, 1.2] + [1.0] * 36))
    assert levels == {("good", "quality"), ("note", "quality")}
    assert "60% of the KL" in text
    assert "4,096 tokens are few" in text


@pytest.mark.parametrize(
    ("steps", "level", "says"),
    [
        (losses([1.0] * 20 + [1.1] * 20), "warning", "did not fall"),
        (losses([2.0 - step / 40 for step in range(40)]), "note", "still falls"),
        (
            [*losses([2.0] * 10 + [1.0] * 30), {"step": 41, "gradient_norm": 11.0}],
            "warning",
            "first in step 41",
        ),
    ],
)
def test_remarks_on_curves(steps, level, says, report_data):
    levels, text = remarks(report_data, steps=steps)
    assert (level, "training") in levels
    assert says in text


def test_remarks_on_few_steps_are_not_made(report_data):
    assert "training" not in {section for _, section in remarks(report_data, steps=losses([1, 2, 3]))[0]}


@pytest.mark.parametrize(("value", "interval"), [(-0.1, [-0.2, -0.05]), (0.1, [-0.05, 0.2]), (0.0, None)])
def test_a_gain_that_is_none_is_a_warning(value, interval, report_data, evaluation):
    document = evaluation()
    document["texts"][0] |= {"kl_removed": value, "kl_removed_interval": interval}
    levels, _ = remarks(report_data, evaluation=parse_evaluation(document, "evaluation"))
    assert ("warning", "quality") in levels


def test_remarks_on_tensors(report_data):
    row = report_data.tensors[1]
    assert {level for level, section in remarks(report_data)[0] if section == "tensors"} == set()
    levels, text = remarks(report_data, **changed(report_data, edge_share=0.5))
    assert ("warning", "tensors") in levels
    assert row.name in text
    counts = (0, *row.qat_counts[1:])
    levels, _ = remarks(report_data, **changed(report_data, qat_counts=counts, dead_codes=counts.count(0)))
    assert ("warning", "tensors") in levels
    levels, _ = remarks(report_data, **changed(report_data, qat_error=3 * row.ptq_error))
    assert ("note", "tensors") in levels


def test_codes_that_did_not_move_are_a_warning(report_data):
    still = [
        dataclasses.replace(row, flip_rate=0.0005) if row.flip_rate is not None else row
        for row in report_data.tensors
    ]
    levels, text = remarks(report_data, tensors=still)
    assert ("warning", "layers") in levels
    assert "0.05%" in text


def test_steps_that_flipped_nothing_are_a_warning_whatever_the_start_did(report_data):
    steps = [{"step": 1, "loss": 1.0, "flip_rate": 0.0}, {"step": 2, "loss": 1.0, "flip_rate": 0.0004}]
    levels, text = remarks(report_data, steps=steps)
    assert ("warning", "layers") in levels
    assert "0.04%" in text


def test_nothing_to_train_is_no_reason_for_one(report_data):
    frozen = [dataclasses.replace(row, trained=False) for row in report_data.tensors]
    assert ("warning", "layers") not in remarks(report_data, tensors=frozen)[0]
