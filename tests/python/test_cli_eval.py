"""`libqat eval`: run folders, models beside a reference, and what it says about bad input."""

import json
import sys

import pytest
from command_line import fails, run, works

from libqat import finetune, run_folder

FEW = ["--tokens", 300, "--window", 50, "--resamples", 50]


@pytest.fixture(scope="module")
def folder(hf_folder, text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli-eval") / "run"
    tokens = finetune.tokenize_files(hf_folder, [text_file])
    options = {"steps": 3, "sequence_length": 16, "learning_rate": 3e-4}
    assert finetune.start(hf_folder, tokens, "int4-channel", path, text=[text_file], **options).train()
    return path


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Questions and a metric in the current folder."""
    monkeypatch.chdir(tmp_path)
    questions = [{"question": "A list of", "choices": ["names", "x y z"], "answer": i % 2} for i in range(6)]
    (tmp_path / "exam.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "my_metric.py").write_text(
        "import torch\n"
        "def mean_logit(model, tokenizer):\n"
        "    ids = torch.tensor([tokenizer.encode('for x in range').ids])\n"
        "    return model(ids).mean(-1)[0]\n"
        "not_a_function = 3\n"
    )
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    sys.modules.pop("my_metric", None)


def test_a_run_folder_says_it_all(folder, text_file, task):
    works("eval", folder, "--text", text_file, "--choices", "exam.jsonl", *FEW)
    out = works("eval", folder, "--metric", "my_metric.py:mean_logit", *FEW)
    assert "mean_logit" in out
    document = run_folder.read_evaluation(folder)
    assert [model["row"] for model in document["models"]] == ["float", "ptq", "qat"]
    assert [entry["name"] for entry in document["texts"]] == ["text"]
    assert [entry["name"] for entry in document["choices"]] == ["exam"]
    assert [entry["name"] for entry in document["metrics"]] == ["mean_logit"]
    assert document["texts"][0]["window"] == 50
    assert document["texts"][0]["resamples"] == 50
    assert document["choices"][0]["questions"] == 6
    assert len(document["metrics"][0]["rows"][1]["difference_interval"]) == 2


def test_tables_show_intervals_and_what_was_removed(folder, text_file, task):
    out = works("eval", folder, "--text", text_file, "--choices", "exam.jsonl", *FEW)
    assert "294 predicted tokens in windows of 50" in out
    assert "training removed" in out
    row = run_folder.read_evaluation(folder)["texts"][0]["rows"][1]
    low, high = row["ppl_interval"]
    assert f"{row['ppl']:.2f} ({low:.2f} to {high:.2f})" in out
    assert "6 questions" in out


def test_without_a_task_it_scores_the_python_reference(folder):
    code, out, err = run("eval", folder, *FEW, "--json")
    assert code == 0
    assert "no task given" in err
    found = json.loads(out)
    assert [entry["name"] for entry in found["texts"]] == ["Python reference"]
    assert found["texts"][0]["tokens"] == 6 * 49


def test_further_models_and_names(folder, hf_folder, text_file, task):
    options = ["--text", f"mine={text_file}", "--out", "result.json", "--json"]
    found = json.loads(works("eval", folder, hf_folder, f"again={folder}", *options, *FEW))
    assert json.loads((task / "result.json").read_text()) == found
    (text,) = found["texts"]
    assert text["name"] == "mine"
    assert [row["row"] for row in text["rows"]] == ["float", "ptq", "qat", str(hf_folder), "again"]
    assert text["rows"][3]["kl"] == 0
    assert {**text["rows"][4], "row": "qat"} == text["rows"][2]


def test_beside_a_reference_nothing_is_stored(folder, hf_folder, text_file, task):
    before = sorted(path.name for path in folder.iterdir())
    options = ["--reference", hf_folder, "--text", text_file, "--json"]
    found = json.loads(works("eval", folder, f"ptq={hf_folder}", f"qat={folder}", *options, *FEW))
    assert sorted(path.name for path in folder.iterdir()) == before
    (text,) = found["texts"]
    assert [row["row"] for row in text["rows"]] == ["float", str(folder), "ptq", "qat"]
    assert text["kl_removed"] is None  # this "ptq" lost nothing


def test_two_seeds_differ_and_one_repeats(folder, text_file, task):
    def intervals(seed):
        document = json.loads(works("eval", folder, "--text", text_file, "--json", "--seed", seed, *FEW))
        return document["texts"][0]["rows"][1]["kl_interval"]

    assert intervals(1) == intervals(1) != intervals(2)


def test_a_module_on_the_path_is_a_metric_too(folder, task):
    works("eval", folder, "--metric", "my_metric:mean_logit", *FEW)


def test_a_metric_file_may_have_any_name_and_import_its_neighbour(folder, task):
    (task / "sub").mkdir()
    (task / "sub" / "json.py").write_text(
        "import neighbour\ndef value(model):\n    import other\n    return neighbour.VALUE + other.VALUE\n"
    )
    (task / "sub" / "neighbour.py").write_text("VALUE = 2\n")
    (task / "other.py").write_text("VALUE = 3\n")
    found = json.loads(works("eval", folder, "--metric", "five=sub/json.py:value", "--json", *FEW))
    assert found["metrics"][0] == {
        "name": "five",
        "rows": [{"row": row, "value": 5, "interval": None} for row in ("float", "ptq", "qat")],
    }
    assert sys.modules["json"] is json
    for name in ("neighbour", "other"):
        del sys.modules[name]


def test_ctrl_c_leaves_the_earlier_evaluation(folder, task):
    works("eval", folder, "--choices", "exam.jsonl", *FEW)
    before = (folder / "evaluation.json").read_bytes()
    (task / "stop.py").write_text("def f(model):\n    raise KeyboardInterrupt\n")
    code, out, _ = run("eval", folder, "--choices", "exam.jsonl", "--metric", "stop.py:f", *FEW)
    assert code == 130
    assert out == ""
    assert (folder / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("my_metric", "module:function"),
        (":mean_logit", "module:function"),
        ("no_such_module:f", "no_such_module"),
        ("no_such_file.py:f", "no_such_file.py"),
        ("my_metric.py:no_such_function", "no_such_function"),
        ("my_metric.py:not_a_function", "not_a_function"),
    ],
)
def test_bad_metrics_are_named(metric, says, folder, task):
    fails("eval", folder, "--metric", metric, says=["--metric", says])


def test_bad_arguments(folder, hf_folder, text_file, task):
    code, _, err = run("eval", hf_folder, "--text", text_file)
    assert code == 2
    assert "--reference" in err
    fails("eval", folder, "--text", text_file, "--text", text_file, says=["text", "NAME=PATH"])
    fails("eval", folder, f"qat={folder}", "--text", text_file, says="qat")
    fails("eval", folder, task / "gone", "--text", text_file, says="gone")
    (task / "bad.jsonl").write_text("{}\n")
    fails("eval", folder, "--choices", "bad.jsonl", says=["bad.jsonl:1", "question"])
    fails("eval", folder, "--text", text_file, *FEW, "--out", task / "no" / "x.json", says="x.json")
    broken = task / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    fails("eval", broken, "--text", text_file, says="finetune.json")
