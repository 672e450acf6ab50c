"""The figures of a report, computed again with numpy from the files of the run."""

import numpy as np
import pytest
import torch
from libqat.html_report import data, overview, tensors
from safetensors import safe_open

import libqat
from libqat import html_report

pytest_plugins = ["reporting"]


def arrays(finished_run, hf_folder, name):
    """(original, latent, checkpoint's entry) of one tensor, read without libqat.html_report."""
    with safe_open(hf_folder / "model.safetensors", "np") as file:
        original = file.get_tensor(name).astype(np.float64)
    with safe_open(finished_run / "state.safetensors", "np") as file:
        latent = file.get_tensor(f"latent/{name}").astype(np.float64)
    return original, latent, libqat.load(finished_run / "model.qat.safetensors").quantized[name]


def q4_0(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ggml's Q4_0 once more, in numpy: (codes, restored)."""
    blocks = weights.astype(np.float32).reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = largest / np.float32(-8)
    inverse = np.where(scale != 0, np.float32(1) / np.where(scale != 0, scale, 1), 0).astype(np.float32)
    codes = np.minimum((blocks * inverse + np.float32(8.5)).astype(np.int8), 15) - 8
    restored = codes * scale.astype(np.float16).astype(np.float64)
    return codes.reshape(weights.shape), restored.reshape(weights.shape)


def relative(a, b):
    return np.sqrt(((a - b) ** 2).sum() / (b**2).sum())


def test_each_figure_of_a_tensor(report_data, finished_run, hf_folder):
    name = "model.layers.1.mlp.down_proj.weight"
    row = next(row for row in report_data.tensors if row.name == name)
    original, latent, quantized = arrays(finished_run, hf_folder, name)
    ptq_codes, ptq = q4_0(original)
    codes = quantized.codes.numpy()
    shipped = libqat.ops.dequantize(quantized.codes, quantized.scales, "q4_0").numpy().astype(np.float64)
    assert (row.kind, row.layer, row.role, row.shape) == ("mlp", 1, "mlp.down_proj", (64, 128))
    assert (row.grid, row.bits_per_weight, row.bytes, row.trained) == ("q4_0", 4.5, 64 * 128 * 18 // 32, True)
    # 1e-5: rows are summed in float32
    assert row.ptq_error == pytest.approx(relative(ptq, original), rel=1e-5)
    assert row.qat_error == pytest.approx(relative(shipped, original), rel=1e-5)
    assert row.distance == pytest.approx(relative(shipped, latent), rel=1e-5)
    assert row.moved == pytest.approx(relative(latent, original), rel=1e-5)
    assert row.flip_rate == (codes != ptq_codes).mean() > 0
    assert row.edge_share == np.isin(codes, [-8, 7]).mean()
    assert list(row.ptq_counts) == [(ptq_codes == code).sum() for code in range(-8, 8)]
    assert list(row.qat_counts) == [(codes == code).sum() for code in range(-8, 8)]
    assert row.dead_codes == list(row.qat_counts).count(0)


def test_what_was_frozen_is_as_the_start_left_it(report_data, finished_run, hf_folder):
    name = "model.embed_tokens.weight"
    row = next(row for row in report_data.tensors if row.name == name)
    assert (row.trained, row.moved, row.kind) == (False, 0, "embedding")
    with safe_open(hf_folder / "model.safetensors", "np") as file:
        original = file.get_tensor(name).astype(np.float64)
    codes = libqat.load(finished_run / "model.qat.safetensors").quantized[name].codes.numpy()
    blocks = original.astype(np.float32).reshape(-1, 32)
    inverse = np.float32(1) / (np.abs(blocks).max(1, keepdims=True) / np.float32(127))  # ggml's Q8_0
    rounded = np.trunc(blocks * inverse + np.copysign(np.float32(0.5), blocks)).reshape(codes.shape)
    assert row.flip_rate == (codes != rounded).mean() > 0
    assert row.ptq_error > row.qat_error == row.distance > 0  # its scales were searched


def test_float_tensors_have_no_codes(report_data):
    row = next(row for row in report_data.tensors if row.name == "model.norm.weight")
    assert (row.kind, row.grid, row.bytes, row.trained) == ("norm", "f32", 4 * 64, True)
    assert row.ptq_error is row.flip_rate is row.dead_codes is None
    assert row.moved > 0


def test_chunks_change_nothing(report_data, finished_run, hf_folder, monkeypatch):
    monkeypatch.setattr(tensors, "_CHUNK", 3 * 128)  # three rows of the widest matrix, which has 64
    again = html_report.gather_run(finished_run)
    for one, other in zip(report_data.tensors, again.tensors, strict=True):
        assert one.qat_counts == other.qat_counts
        # sums of squares in another order
        assert other.qat_error == pytest.approx(one.qat_error, rel=1e-6) if one.qat_error else True
    # counts of a histogram are whole
    assert [shown.latent for shown in again.worst] == [shown.latent for shown in report_data.worst]


def test_histograms_in_code_units(report_data, finished_run, hf_folder):
    shown = report_data.worst[0]
    assert shown.row.qat_error == max(row.qat_error for row in report_data.tensors if row.qat_counts)
    assert [s.row.qat_error for s in report_data.worst] == sorted(s.row.qat_error for s in report_data.worst)[
        ::-1
    ]
    assert shown.levels == tuple(range(-8, 8)) == shown.codes
    original, _, _ = arrays(finished_run, hf_folder, shown.row.name)
    blocks = original.reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = (largest / -8).astype(np.float16).astype(np.float64)
    places = (blocks / scale).clip(-9, 8)
    expected, _ = np.histogram(places, shown.edges)
    # a weight at a bin's border may fall on either side in float32: at most a few of thousands
    assert np.abs(np.array(shown.original) - expected / expected.sum()).max() < 2e-3
    assert sum(shown.latent) == pytest.approx(1)


@pytest.mark.parametrize("grid", [g.name for g in libqat.grids().values() if g.codes])
def test_histograms_of_every_grid(grid):
    """A weight that equals the level of code c lies at c, for either sign of the scale and with an offset."""
    torch.manual_seed(5)
    weight = torch.randn(6, 256) + 0.3
    weight[2] = 0  # a row without a scale must not disturb the others
    codes, scales = libqat.ops.quantize(weight, grid)
    exact = libqat.ops.dequantize(codes, scales, grid)
    shape = tuple(weight.shape)
    one = tensors.Weight("w", shape, grid, 0, True, lambda: weight, lambda: exact, lambda: (codes, scales))
    shown = data.on_grid(one, tensors.measure(one))
    half = [0, 1, 2, 3, 4, 6, 8, 12]  # of 4-bit floats, in halves of the scale
    places = half + [-value for value in half] if "fp4" in grid else shown.codes
    assert shown.levels == pytest.approx(places, abs=1e-3)
    assert sum(shown.latent) == pytest.approx(1)
    filled = {
        round((low + high) / 2)
        for low, high, share in zip(shown.edges, shown.edges[1:], shown.latent, strict=False)
        if share > 0
    }
    alive = {places[int(code) - shown.codes[0]] for code in codes[[0, 1, 3, 4, 5]].unique()}
    assert filled == alive


def test_kinds_and_places():
    kinds = {
        "model.layers.3.self_attn.q_proj.weight": "attention",
        "model.layers.3.mlp.experts.7.up_proj.weight": "mlp",
        "model.layers.3.post_attention_layernorm.weight": "norm",
        "encoder.layer.2.attention.output.LayerNorm.weight": "norm",
        "encoder.layer.2.intermediate.dense.weight": "mlp",
        "encoder.layer.2.output.dense.weight": "mlp",
        "embeddings.word_embeddings.weight": "embedding",
        "lm_head.weight": "head",
        "fc.weight": "other",
    }
    assert {name: tensors.kind_of(name, (2, 2)) for name in kinds} == kinds
    assert tensors.kind_of("features.3.0.weight", (8, 1, 3, 3)) == "conv"
    assert tensors.place_of("model.layers.3.mlp.experts.7.up_proj.weight") == (3, "mlp.experts.*.up_proj")
    assert tensors.place_of("lm_head.weight") == (None, "lm_head")


def test_shares_add_up(report_data):
    for shares in (overview.by_grid(report_data.tensors), overview.by_kind(report_data.tensors)):
        assert sum(share.bytes for share in shares) == sum(row.bytes for row in report_data.tensors)
        assert sum(share.share for share in shares) == pytest.approx(1)
    size = (run_bytes := {share.label: share.bytes for share in overview.by_grid(report_data.tensors)})[
        "q8_0"
    ]
    assert size == 320 * 64 * 34 // 32
    assert list(run_bytes) == sorted(run_bytes, key=run_bytes.get, reverse=True)


def test_heat_maps_have_layers_and_roles(report_data):
    maps = overview.heat_maps(report_data.tensors)
    assert [layer for layer, _ in maps[0].lines] == [0, 1]
    assert [short for short, _ in maps[0].roles] == ["q", "k", "v", "o", "gate", "up", "down"]
    row = next(row for row in report_data.tensors if row.name == "model.layers.1.mlp.up_proj.weight")
    assert maps[2].lines[1][1][5].value == row.flip_rate
    assert {cell.heat for _, cells in maps[2].lines for cell in cells} >= {0, 100}


def test_short_names_stay_apart():
    assert overview.short_names(["a.x.dense", "a.y.dense", "a.q_proj"]) == ["x.dense", "y.dense", "a.q"]


def test_what_evaluate_run_writes_is_what_the_page_shows(run_copy, text_file):
    """Texts, questions, a metric and a further model, through the file between the two commands."""
    task = libqat.EvaluationTask(
        texts={"the text": text_file},
        choices={"the questions": [{"question": "One and", "choices": ["two", "blue"], "answer": 0}] * 3},
        metrics={"the metric": lambda model: [0.25, 0.75]},
        tokens=512,
        window=64,
        resamples=50,
    )
    (run_copy / "evaluation.json").unlink()
    found = libqat.evaluate_run(run_copy, task, more={"again": run_copy / "model.qat.safetensors"})
    data = html_report.gather_run(run_copy)
    [text], [asked], [metric] = data.evaluation.texts, data.evaluation.choices, data.evaluation.metrics
    assert [row.row for row in text.rows] == ["float", "ptq", "qat", "again"]
    for shown, written in zip(text.rows, found["texts"][0]["rows"], strict=True):
        assert shown.scores["kl"].value == written["kl"]
        assert shown.scores["ppl"].interval == tuple(written["ppl_interval"])
    assert text.row("again").scores == text.row("qat").scores
    assert text.kl_removed.value == found["texts"][0]["kl_removed"]
    assert asked.items == 3
    for shown, written in zip(asked.rows, found["choices"][0]["rows"], strict=True):
        assert {name: score.value for name, score in shown.scores.items()} == {
            name: written[name] for name in ("accuracy", "accuracy_norm", "agreement")
        }
    assert [row.scores["value"].value for row in metric.rows] == [0.5] * 4
    page = html_report.render(data)
    for expected in ("the text", "the questions", "the metric", "Accuracy per byte", "rounded in memory"):
        assert expected in page, expected
