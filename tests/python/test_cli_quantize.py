"""`libqat quantize`, by every method."""

import json
import signal
from unittest import mock

import pytest
import torch
from command_line import run, works

import libqat
from libqat import cli, data, ptq


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


POLICY = libqat.Policy.preset("gguf-q4_0").with_scale("learned")
METHODS = {
    "weighted": libqat.weighted_search,
    "gptq": libqat.gptq,
    "awq": libqat.awq,
    "guided": libqat.guided,
}


@pytest.mark.parametrize("method", METHODS)
def test_quantize_calibrates(method, hf_folder, text_file, tmp_path):
    path = tmp_path / "model.qat.safetensors"
    options = ["--text", text_file, "--tokens", 512, "--window", 64, "--out", path, "--json"]
    options += ["--generated", 0] if method == "guided" else []  # test_generation.py has its default
    found = json.loads(works("quantize", hf_folder, "--method", method, *options))
    assert found["method"] == method
    assert found["calibration_tokens"] == 512
    assert found["bytes"] == path.stat().st_size
    key = "folds" if method == "awq" else "output_errors"
    assert len(found[key]) == (8 if method == "awq" else 14)
    assert ("expected_kl" in found) == (method == "guided")

    loaded = libqat.load_model(hf_folder)
    ids = data.tokenize(libqat.load_tokenizer(hf_folder), data.read_texts([text_file]))
    prepared = libqat.prepare(loaded.decoder, POLICY)
    METHODS[method](prepared, ptq.calibration_windows(ids, 512, 64))
    expected = libqat.dequantize(libqat.freeze(prepared, loaded.config, loaded.tokenizer))
    weights = libqat.dequantize(libqat.load(path))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    works("export", path, tmp_path / "model.gguf")
    assert "exactly" in works("verify", tmp_path / "model.gguf", "--against", path)


def test_quantize_says_what_it_needs(hf_folder, text_file):
    code, _, err = run("quantize", hf_folder, "--method", "gptq")
    assert code == 2
    assert "expected --text FILE for method gptq" in err
    code, _, err = run("quantize", hf_folder, "--method", "rtn", "--text", text_file)
    assert code == 2
    assert "expected no --text for method rtn" in err


def test_quantize_stops_at_ctrl_c(hf_folder, text_file, tmp_path):
    def press_ctrl_c(*_):
        signal.raise_signal(signal.SIGINT)

    path = tmp_path / "model.qat.safetensors"
    pressed = mock.MagicMock()
    pressed.return_value.__enter__.return_value = press_ctrl_c
    with mock.patch.object(cli.console, "progress", pressed):
        code, _, err = run("quantize", hf_folder, "--method", "gptq", "--text", text_file, "--out", path)
    assert code == 130
    assert "interrupted; nothing was written" in err
    assert not path.exists()
