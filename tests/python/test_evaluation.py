"""Texts, metrics and run folders: entries of evaluation.json."""

import copy
import json

import numpy as np
import pytest
import torch
from libqat.data import spread_windows
from libqat.evaluation import _measured
from torch import nn

import libqat
from libqat import ArgumentError, FileError, finetune, run_folder


@pytest.fixture(scope="module")
def run(hf_folder, text_file, tmp_path_factory):
    """A finished run of the tiny model on a coarse grid, so that its rows differ visibly."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    policy = {"rules": [{"match": ".*_proj", "weight": "int2_channel"}]}
    tokens = finetune.tokenize_files(hf_folder, [text_file])
    options = {"steps": 10, "sequence_length": 32, "batch_size": 4, "learning_rate": 3e-4}
    started = finetune.start(hf_folder, tokens, policy, folder, text=[text_file], **options)
    assert started.train()
    return folder


# ---- texts


def test_a_text_entry_holds_the_scores_and_their_intervals():
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(3, 17, 17, generator=generator)
    tokens = torch.randint(17, (200,), generator=generator)
    models = {
        "float": lambda t: tables[0][t],
        "ptq": lambda t: (tables[0] + tables[1])[t],
        "qat": lambda t: (tables[0] + 0.3 * tables[2])[t],
    }
    entry = libqat.compare_text(models, tokens, name="mine", window=20, resamples=300, seed=4)
    scores = libqat.compare(models["float"], [models["ptq"], models["qat"]], tokens, window=20)
    intervals = libqat.score_intervals(scores, resamples=300, seed=4)
    shares = libqat.removed(*scores, resamples=300, seed=4)
    assert {key: entry[key] for key in ("name", "tokens", "window", "resamples")} == {
        "name": "mine",
        "tokens": 190,
        "window": 20,
        "resamples": 300,
    }
    for row, score, interval in zip(entry["rows"], scores, intervals, strict=True):
        assert (row["ppl"], row["nll"], row["kl"], row["top1"]) == (
            score.perplexity,
            score.nll,
            score.kl,
            score.top1,
        )
        assert all(row[f"{key}_interval"] == list(interval[key]) for key in ("ppl", "nll", "kl", "top1"))
    assert [row["row"] for row in entry["rows"]] == ["float", "ptq", "qat"]
    assert entry["kl_removed"] == shares["kl"]
    assert entry["nll_removed_interval"] == list(shares["nll_interval"])
    json.dumps(entry, allow_nan=False)


def test_what_does_not_exist_is_none_and_not_nan():
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
    models = {row: lambda t: table[t] for row in ("float", "ptq", "qat")}
    one_window = libqat.compare_text(models, torch.arange(9))
    assert one_window["rows"][0]["ppl_interval"] is None
    assert one_window["kl_removed"] is None  # nothing was lost, so nothing can be removed
    assert one_window["nll_removed_interval"] is None
    json.dumps(one_window, allow_nan=False)
    assert "kl_removed" not in libqat.compare_text({"float": models["float"]}, torch.arange(9))
    with pytest.raises(ArgumentError, match="at least one"):
        libqat.compare_text({}, torch.arange(9))


def test_windows_are_spread_over_the_text():
    tokens = torch.arange(103)
    assert spread_windows(tokens, 103, 10) is tokens
    assert spread_windows(tokens, 30, 10).tolist() == [*range(10), *range(40, 50), *range(90, 100)]
    assert spread_windows(tokens, 35, 10).tolist() == spread_windows(tokens, 30, 10).tolist()
    assert spread_windows(tokens, 7, 10).tolist() == list(range(7))


# ---- metrics


def errors_of(model):
    return (model(torch.linspace(-1, 1, 16)[:, None])[:, 0] - 1).abs()


def test_a_metric_per_item_has_paired_intervals():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    coarse = libqat.prepare(copy.deepcopy(net), "int2-channel")
    models = {"float": net.train(), "ptq": coarse.model}
    entry = libqat.compare_metric(models, errors_of, resamples=200, seed=3)
    assert entry["name"] == "errors_of"
    with torch.no_grad():
        items = [errors_of(model.eval()).double().numpy() for model in (net, coarse.model)]
    for row, values in zip(entry["rows"], items, strict=True):
        assert row["value"] == pytest.approx(values.mean(), rel=1e-12)
        assert row["interval"] == list(libqat.mean_interval(values.tolist(), resamples=200, seed=3))
    apart = entry["rows"][1]
    assert apart["difference"] == pytest.approx((items[1] - items[0]).mean(), rel=1e-12)
    low, high = libqat.mean_interval((items[1] - items[0]).tolist(), resamples=200, seed=3)
    assert apart["difference_interval"] == [low, high]
    assert "difference" not in entry["rows"][0]


def test_modules_are_in_evaluation_mode_only_while_measured():
    net = nn.Sequential(nn.Linear(1, 4), nn.Sequential(nn.Dropout(0.5)))
    net.train()
    net[1].eval()
    modes = []

    def metric(model):
        modes.append([part.training for part in model.modules()])
        assert not torch.is_grad_enabled()
        return 0.5

    entry = libqat.compare_metric({"float": net}, metric, name="mine")
    assert entry == {"name": "mine", "rows": [{"row": "float", "value": 0.5, "interval": None}]}
    assert modes == [[False] * 4]
    assert [part.training for part in net.modules()] == [True, True, False, False]
    prepared = libqat.prepare(net, "int4-channel")
    libqat.compare_metric({"qat": prepared}, lambda view: metric(view.model))
    assert modes[1] == [False] * 4
    assert net.training


@pytest.mark.parametrize(
    ("returned", "value", "items"),
    [
        (3, 3.0, None),
        (torch.tensor(0.25), 0.25, None),
        (np.float32(0.5), 0.5, None),
        ([True, False, True, True], 0.75, 4),
        (torch.tensor([1.0, 2.0]), 1.5, 2),
        (np.array([1, 2, 6]), 3.0, 3),
        ((x for x in (1, 3)), 2.0, 2),
    ],
)
def test_what_a_metric_may_return(returned, value, items):
    found, values = _measured(lambda model: returned, None, "")
    assert found == value
    assert (values is None) if items is None else (len(values) == items)


@pytest.mark.parametrize("returned", [None, "0.5", [], [[1.0]], ["a"], torch.zeros(2, 2), {"a": 1}])
def test_a_metric_that_returns_something_else_is_named(returned):
    with pytest.raises(ArgumentError, match=r"wrong\(float\)"):
        libqat.compare_metric({"float": None}, lambda model: returned, name="wrong")


def test_items_must_be_the_same_for_each_model():
    with pytest.raises(ArgumentError, match=r"m\(ptq\): expected as many items .* got 2 here and 3"):
        libqat.compare_metric({"float": 3, "ptq": 2}, lambda n: [0.0] * n, name="m")


def test_a_metric_that_is_not_finite_is_none():
    rows = libqat.compare_metric({"float": 0}, lambda model: float("inf"))["rows"]
    assert rows[0]["value"] is None


# ---- run folders


def test_the_models_of_a_run(run, hf_folder, text_file, tmp_path):
    rows = libqat.open_run(run)
    assert [model.row for model in rows] == ["float", "ptq", "qat"]
    tokens = finetune.tokenize_files(hf_folder, [text_file])[:64][None]

    source = libqat.load_model(hf_folder)
    assert rows[0].decoder(tokens).equal(source.decoder(tokens))
    policy = libqat.Policy.from_json(json.dumps(run_folder.read_policy(run)))
    assert policy.scale == "learned"
    prepared = libqat.prepare(source.decoder, policy.with_scale("reference"))
    path = tmp_path / "rtn.qat.safetensors"
    libqat.save(prepared.freeze(source.config, source.tokenizer), path)
    assert rows[1].decoder(tokens).equal(libqat.load_checkpoint(path).decoder(tokens))
    assert (
        rows[2].decoder(tokens).equal(libqat.load_checkpoint(run / "model.qat.safetensors").decoder(tokens))
    )
    assert not any(p.requires_grad for model in rows for p in model.decoder.parameters().values())

    assert [model.path for model in rows] == [str(hf_folder), "", str(run / "model.qat.safetensors")]
    # 73,728 weights in 2 bits and a float32 scale for each row of the 7 matrices of both layers; the
    # embedding of 320 x 64 and 5 norms of 64 in float32
    rows_of_matrices = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    size = 73728 // 4 + 4 * rows_of_matrices + (320 * 64 + 5 * 64) * 4
    assert [model.bytes for model in rows] == [94528 * 4, size, size]
    assert rows[1].bits_per_weight == 8 * size / 94528


def test_a_run_is_evaluated_into_its_folder(run, text_file):
    def length(model, tokenizer):
        return [len(tokenizer.encode("a b").ids)] * 3

    task = libqat.EvaluationTask(
        texts={"mine": text_file, "given": ["Some words.", "And others."], "ids": torch.arange(300)},
        metrics={"length": length, "one": lambda model: 1.0},
        tokens=600,
        window=50,
        resamples=100,
    )
    more = {"again": run}
    found = libqat.evaluate_run(run, task, more)
    stored = run_folder.read_evaluation(run)
    assert {key: stored[key] for key in found} == found
    assert [model["row"] for model in found["models"]] == ["float", "ptq", "qat", "again"]
    assert [entry["name"] for entry in found["texts"]] == ["mine", "given", "ids"]
    mine = found["texts"][0]
    assert mine["tokens"] == 12 * 49
    float_, ptq, qat, again = mine["rows"]
    assert float_["kl"] == 0 < qat["kl"] < ptq["kl"]
    assert {**again, "row": "qat"} == qat
    assert mine["kl_removed_interval"][0] < mine["kl_removed"] < mine["kl_removed_interval"][1]
    assert [row["value"] for row in found["metrics"][0]["rows"]] == [2.0] * 4
    assert [entry["name"] for entry in found["metrics"]] == ["length", "one"]


def test_two_rows_of_one_name_are_refused(run):
    before = (run / "evaluation.json").read_bytes() if (run / "evaluation.json").exists() else None
    task = libqat.EvaluationTask(metrics={"one": lambda model: 1.0})
    with pytest.raises(ArgumentError, match="qat: expected different row names"):
        libqat.evaluate_run(run, task, {"qat": run})
    assert before == ((run / "evaluation.json").read_bytes() if before else None)


def test_a_run_folder_that_lacks_something_says_what(run, tmp_path):
    with pytest.raises(FileError, match=r"finetune\.json"):
        libqat.open_run(tmp_path)
    for name in ("finetune.json", "run.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(FileError, match="not finished"):
        libqat.open_run(tmp_path)
    found = json.loads((tmp_path / "finetune.json").read_text())
    (tmp_path / "finetune.json").write_text(json.dumps(found | {"model": "/no/such/model"}))
    with pytest.raises(FileError, match="/no/such/model"):
        libqat.open_run(tmp_path)


def test_a_float_reference_counts_as_the_float_numbers_it_is_compared_as(run, tmp_path):
    """A quantized GGUF is dequantized before it is compared."""
    loaded = libqat.load_model(run_folder.read_finetune(run)["model"])
    checkpoint = libqat.freeze(libqat.prepare(loaded.decoder, "gguf-q4_0"), loaded.config, loaded.tokenizer)
    path = tmp_path / "x.gguf"
    libqat.export(checkpoint, path)
    quantized = 73728 * 18 // 32 + 320 * 64 * 34 // 32 + 5 * 64 * 4
    assert libqat.open_model(path).bytes == quantized
    assert libqat.open_model(path).row == str(path)
    assert libqat.open_model(path, "float").bytes == 94528 * 4
