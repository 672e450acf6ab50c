"""The report's page: HTML's rules, nothing from outside, hostile names, the same bytes; and the command."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import html5lib
import pytest
import torch
from libqat.html_report import curves, overview
from libqat.html_report.evaluation import parse_evaluation
from torch import nn

import libqat
from libqat import UnsupportedError, html_report

pytest_plugins = ["reporting"]

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(2)>&amp;\'{{ 7 * 7 }}'
HOSTILE += "$\\frac$\x00\x1b日本\udcff"
SHOWN = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\udcff", "\ufffd")


def parsed(html: str):
    """The document by html5lib, which refuses any parse error."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(html)


def elements(tree, tag=None):
    found = [element for element in tree.iter() if isinstance(element.tag, str)]
    return [element for element in found if tag is None or element.tag.rpartition("}")[2] == tag]


def words(tree) -> str:
    """What a reader sees."""
    unseen = {text for tag in ("style", "script") for e in elements(tree, tag) for text in e.itertext()}
    return " ".join("".join(text for text in tree.itertext() if text not in unseen).split())


def check(html: str):
    """What holds for every page: valid, ids once, links lead somewhere, nothing from outside."""
    tree = parsed(html)
    ids = [element.get("id") for element in elements(tree) if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in elements(tree):
        for name, value in element.attrib.items():
            name = str(name).rpartition("}")[2]
            assert name not in ("src", "srcset", "data", "action", "poster", "background"), value
            assert not name.startswith("on"), (name, value)
            if name == "href":
                assert value == "data:," or value.removeprefix("#") in ids, value
            if name == "aria-labelledby":
                assert value in ids
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.removeprefix("#") in ids
    styles = " ".join(element.text or "" for element in elements(tree, "style"))
    assert "@import" not in styles
    assert "url(" not in styles
    for table in elements(tree, "table"):
        assert elements(table, "caption")
        assert all(head.get("scope") in ("row", "col") for head in elements(table, "th"))
    for svg in elements(tree, "svg"):
        assert svg.get("role") == "img"
        assert elements(svg, "title")[0].text
    assert len(elements(tree, "script")) == 1
    assert elements(tree, "html")[0].get("lang")
    return tree


def test_the_page_is_valid_and_complete(report_page, report_data):
    tree = check(report_page)
    text = words(tree)
    for row in report_data.tensors:
        assert row.name in text
    assert [heading.text for heading in elements(tree, "h2")] == [
        "Summary", "Quality", "Training", "Sizes", "Error by layer", "Tensors", "Weights on their grid",
    ]  # fmt: skip
    assert text.count("How to read this.") == 7
    for expected in (
        "tiny-llama",
        "gguf-q4_0",
        libqat.__version__,
        "60% (55% to 65%)",
        "768 tokens",
        "libqat finetune",
    ):
        assert expected in text, expected
    assert "Loss removed: 55%." in text  # an interval without both ends is none
    assert "{{" not in report_page
    assert "None" not in text


def test_the_policy_forbids_every_request(report_page):
    tree = parsed(report_page)
    policy = next(e.get("content") for e in elements(tree, "meta") if e.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "http" not in re.sub(r"http-equiv", "", report_page)


def test_figures_take_the_colours_of_the_page(report_page):
    drawn = " ".join(re.findall(r"<svg.*?</svg>", report_page, re.S))
    assert "var(--qat)" in drawn
    assert not re.search(r"#[0-9a-f]{6}", drawn), "a colour that a dark page would not change"


def test_the_same_run_gives_the_same_bytes(report_page, finished_run, tmp_path):
    """In another process, with another thread count and other hashes."""
    out = tmp_path / "again.html"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "libqat", "report", str(finished_run), "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert out.read_bytes() == report_page.encode()
    printed = json.loads(done.stdout)
    assert (printed["report"], printed["bytes"]) == (str(out), len(report_page.encode()))
    assert printed["tensors"][1]["name"] == "model.layers.0.self_attn.q_proj.weight"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [out]


def test_hostile_names_stay_text(report_data, tmp_path, evaluation):
    """Of a model, a text, a row, a path, a tensor, a command and a policy."""
    document = evaluation(HOSTILE)
    document["models"][0] |= {"row": HOSTILE, "path": HOSTILE}
    document["texts"][0]["rows"][3]["row"] = HOSTILE
    row = dataclasses.replace(report_data.worst[0].row, name=HOSTILE, role=HOSTILE, grid="q4_0")
    data = dataclasses.replace(
        report_data,
        title=HOSTILE,
        tensors=[*report_data.tensors, row],
        worst=[dataclasses.replace(report_data.worst[0], row=row)],
        evaluation=parse_evaluation(document, "evaluation"),
        command=HOSTILE,
        policy=HOSTILE,
        policy_name=HOSTILE,
        file=HOSTILE,
    )
    html = html_report.render(data)
    tree = check(html)
    assert not elements(tree, "img")
    assert words(tree).count(SHOWN) >= 10
    assert "49" not in re.findall(r"<h1>.*?</h1>", html)[0]


def test_undecodable_names_are_written(report_data, tmp_path, evaluation):
    """A file name may hold bytes that are no UTF-8."""
    odd = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    data = dataclasses.replace(report_data, evaluation=parse_evaluation(evaluation(odd), "e"))
    path = html_report.save_page(html_report.render(data), tmp_path / "x.html")
    check(path.read_text(encoding="utf-8"))


def test_without_an_evaluation_it_says_how_to_make_one(run_copy):
    (run_copy / "evaluation.json").unlink()
    path = libqat.write_report(run_copy)
    assert path == run_copy / "report.html"
    text = words(check(path.read_text(encoding="utf-8")))
    assert f"libqat eval {run_copy} --text FILE" in text


def test_a_control_run(hf_folder, text_file, tmp_path):
    """Nothing is on a grid: no maps, no histograms, and the page says so."""
    tokens = libqat.finetune.tokenize_files(hf_folder, [text_file])
    libqat.finetune.start(
        hf_folder, tokens, libqat.finetune.FLOAT, tmp_path, text=[text_file], steps=2, sequence_length=16,
        frozen=list(libqat.finetune.FROZEN),
    ).train()  # fmt: skip
    data = html_report.gather_run(tmp_path)
    text = words(check(html_report.render(data)))
    assert "The control" in text
    assert "No tensor of this model is on a grid with codes." in text
    assert "--control" in data.command


def test_a_large_model_stays_small(report_data):
    """210 matrices, as a 135M model has them, with 2,000 steps."""
    some = [row for row in report_data.tensors if row.layer == 1]
    rows = [
        dataclasses.replace(row, layer=layer, name=row.name.replace(".1.", f".{layer}."))
        for layer in range(30)
        for row in some
    ]
    steps = [{**report_data.steps[step % 24], "step": step + 1} for step in range(2000)]
    html = html_report.render(dataclasses.replace(report_data, tensors=rows, steps=steps))
    assert len(rows) >= 210
    assert len(html.encode()) < 2e6
    check(html)


class Net(nn.Module):
    """Convolutions (one depthwise), BatchNorm and a bias; names without layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)


def trained_net() -> tuple[libqat.PreparedModel, dict]:
    torch.manual_seed(0)
    net = Net()
    original = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    prepared = libqat.prepare(net, "int4-channel")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    net.fc.bias.requires_grad_(False)
    return prepared, original


def test_a_model_of_the_users_own(tmp_path, evaluation):
    prepared, original = trained_net()
    telemetry = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    path = libqat.write_model_report(
        prepared, original, tmp_path / "net.html", title="net", telemetry=telemetry, evaluation=evaluation()
    )
    text = words(check(path.read_text(encoding="utf-8")))
    for expected in (
        "depthwise.weight",
        "int4_channel",
        "16×1×3×3",
        "Not trained fc.bias",
        "60% (55% to 65%)",
    ):
        assert expected in text, expected
    data = html_report.gather_model(prepared, original, title="net")
    rows = {row.name: row for row in data.tensors}
    report = {row.name: row for row in prepared.report()}
    for name, row in rows.items():
        assert (row.bytes, row.grid) == (report[name].bytes, report[name].grid)
        if row.distance is not None:
            # report_tensor computes in float64, the page's rows in float32
            assert row.distance == pytest.approx(report[name].relative_error, rel=1e-5)
    assert rows["depthwise.weight"].kind == "conv"
    assert rows["stem.weight"].flip_rate > 0
    assert rows["norm.bias"].moved is None  # it began as zeros
    assert rows["norm.weight"].moved > 0
    assert not overview.heat_maps(data.tensors)  # no layers: a line in the model's order instead


def test_a_model_and_other_weights(tmp_path):
    prepared, original = trained_net()
    for spoilt in ({}, {**original, "fc.weight": torch.zeros(3, 3)}):
        with pytest.raises(libqat.ArgumentError, match=r"original: (stem|fc)\.weight: expected"):
            libqat.write_model_report(prepared, spoilt, tmp_path / "x.html", title="net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named(package, report_data, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=rf"{package}.*libqat\[report\]"):
        html_report.render(report_data)


def test_long_series_are_thinned(report_data):
    steps = [{"step": step, "loss": float(step % 2)} for step in range(1, 5001)]
    [(title, svg)] = curves.training_figures(steps)
    assert title == "Loss"
    assert len(svg) < 40_000
    assert "steps 1 to 5000" in svg


def test_curves_of_evaluations_and_as_png(tmp_path):
    scores = {"nll": 3.0, "kl": 0.25, "top1": 0.5}
    steps = [
        {"step": step, "loss": 1.0, "evaluation": {"student": scores, "teacher": scores}} for step in (5, 10)
    ]
    assert curves.series(steps, "evaluation") == ([5, 10], [0.25, 0.25])
    alone = [{"step": 5, "evaluation": {"student": scores}}]
    assert curves.series(alone, "evaluation") == ([5], [3.0])
    for name in ("a.png", "b.png"):
        html_report.save_training_png(steps, tmp_path / name, "title")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_moving_a_run_needs_the_model(run_copy, hf_folder, tmp_path):
    started = json.loads((run_copy / "finetune.json").read_text())
    model = shutil.copytree(hf_folder, tmp_path / "elsewhere")
    (run_copy / "finetune.json").write_text(json.dumps(started | {"model": "/gone"}))
    with pytest.raises(libqat.FileError, match=r"/gone.*--model"):
        libqat.write_report(run_copy)
    text = libqat.write_report(run_copy, tmp_path / "x.html", model=model).read_text(encoding="utf-8")
    assert "<h1>elsewhere</h1>" in text
