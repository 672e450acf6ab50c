"""GPTQ, weighted search and AWQ on whole models, and `libqat quantize` with them."""

import copy
import json
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import make_llama
from test_cli import run, works

import libqat
from libqat import _core, cli, data, ptq

POLICY = libqat.Policy.preset("gguf-q4_0").with_scale("learned")
ORDER = ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]


@pytest.fixture
def tokens(hf_folder, text_file):
    ids = data.tokenize(libqat.load_tokenizer(hf_folder), data.read_texts([text_file]))
    return ptq.calibration_windows(ids, 1024, 64)


@pytest.fixture
def loaded(hf_folder):
    return libqat.load_model(hf_folder)


def shipped(prepared):
    return libqat.dequantize(prepared.freeze("", ""))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens)


def moments(model, layer, tokens):
    """E[x x^T] of a layer's inputs, by a hook on a transformers model."""
    seen = []

    def record(_, inputs):
        seen.append(inputs[0].flatten(0, 1).double())

    hook = layer.register_forward_pre_hook(record)
    logits(model, tokens)
    hook.remove()
    x = torch.cat(seen)
    return x.T @ x / len(x)


def test_each_layer_is_rounded_behind_those_before_it(loaded, tokens):
    """A transformers model, rounded layer by layer in that order, sees the inputs of libqat's stages."""
    model = make_llama()
    prepared = libqat.prepare(loaded.decoder, POLICY)
    embedding = shipped(prepared)["model.embed_tokens.weight"]
    found = libqat.gptq(prepared, tokens, compute_dtype="float32")
    result = shipped(prepared)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
    names = []
    for index, layer in enumerate(model.model.layers):
        for group in ORDER:
            modules = [getattr(layer.self_attn, n, None) or getattr(layer.mlp, n, None) for n in group]
            h = moments(model, modules[0], tokens)
            for name, module in zip(group, modules, strict=True):
                part = "self_attn" if hasattr(layer.self_attn, name) else "mlp"
                names.append(f"model.layers.{index}.{part}.{name}.weight")
                latent, scales = _core.gptq_tensor(module.weight.detach(), h, "q4_0")
                codes = _core.grid_encode("q4_0", latent.numpy(), scales.numpy())
                stored = _core.grid_store("q4_0", scales.numpy(), latent.shape[1])
                expected = torch.from_numpy(_core.grid_decode("q4_0", codes, stored))
                # float32 forward passes of two programs: a weight on a border may fall to the other side
                assert (result[names[-1]] != expected).float().mean() < 0.01, names[-1]
                with torch.no_grad():
                    module.weight.copy_(result[names[-1]])
    assert [one.name for one in found] == names
    assert all(one.grid == "q4_0" and 0.001 < one.output_error < 0.3 for one in found)


def test_the_methods_keep_their_order(hf_folder, loaded, tokens):
    """On the calibration text: rounding errs most, then searched, weighted scales, compensated weights."""
    expected = logits(loaded.decoder, tokens)
    policy = {"rules": [{"match": ".*_proj", "weight": "int3_g32"}]}
    errors = {}
    for method in ("reference", "search", "weighted", "gptq"):
        scale = method if method in ("reference", "search") else "learned"
        decoder = libqat.load_model(hf_folder).decoder
        prepared = libqat.prepare(decoder, libqat.Policy.from_json(json.dumps(policy)).with_scale(scale))
        if method == "weighted":
            libqat.weighted_search(prepared, tokens, compute_dtype="float32")
        if method == "gptq":
            libqat.gptq(prepared, tokens, compute_dtype="float32")
        errors[method] = float((logits(decoder, tokens) - expected).square().mean())
    assert errors["gptq"] < errors["weighted"] < errors["search"] < errors["reference"], errors


def test_progress_and_stopping(loaded, tokens):
    prepared = libqat.prepare(loaded.decoder, POLICY)
    seen = []
    libqat.gptq(prepared, tokens, batch=4, progress=lambda *now: seen.append(now))
    stages = 4 * 2 + 1
    assert [now[0] for now in seen] == list(range(1, stages * 4 + 1))
    assert {now[1] for now in seen} == {stages * 4}
    assert seen[0][2] == "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ZeroDivisionError):
        libqat.gptq(prepared, tokens, progress=lambda *_: 1 / 0)


def test_bad_arguments_are_named(hf_folder, tokens):
    prepared = libqat.prepare(libqat.load_model(hf_folder).decoder, "gguf-q4_0")
    for method in (libqat.gptq, libqat.weighted_search, libqat.awq):
        with pytest.raises(libqat.ArgumentError, match=r"embed_tokens.weight: expected a policy with"):
            method(prepared, tokens)
    prepared = libqat.prepare(libqat.load_model(hf_folder).decoder, POLICY)
    with pytest.raises(libqat.ArgumentError, match=r"windows: expected int64\[n, T\]"):
        libqat.gptq(prepared, tokens[0])
    with pytest.raises(libqat.ArgumentError, match="batch: expected at least 1"):
        libqat.gptq(prepared, tokens, batch=0)
    with pytest.raises(libqat.ArgumentError, match="expected ids in"):
        libqat.gptq(prepared, tokens + 1000)
    prepared.decoder.parameters()["model.layers.1.input_layernorm.weight"].data[3] = float("nan")
    for method in (libqat.gptq, libqat.weighted_search, libqat.awq):
        with pytest.raises(
            libqat.NumericError, match=r"layers\.1\.self_attn\.q_proj\.weight: expected a finite"
        ):
            method(prepared, tokens)


def test_moments_are_those_of_float32_also_under_autocast():
    x = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    moments = _core.InputMoments(400)
    with torch.autocast("cpu", torch.bfloat16):
        for part in x.split(64):
            moments.add(part.view(2, -1, 400) if len(part) % 2 == 0 else part)
    assert moments.count == 300
    exact = x.double()
    # float32 sums of 64 products of numbers around 1
    torch.testing.assert_close(moments.second(), exact.T @ exact / 300, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments.magnitude(), exact.abs().mean(0), rtol=1e-6, atol=0)
    with pytest.raises(libqat.ArgumentError, match=r"InputMoments: input: expected floats \[..., 400\]"):
        moments.add(x[:, 1:])


# ---- AWQ


def numpy_awq(weights, h, magnitude, grid, steps=20):
    best = (np.inf, None, None)
    plain = None
    for step in range(steps + 1):
        s = np.maximum(magnitude ** (step / steps), 1e-4)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        error = 0.0
        for w in weights:
            scaled = w * s
            scales = _core.grid_choose(grid, scaled)
            codes = _core.grid_encode(grid, scaled, scales)
            difference = w - _core.grid_decode(grid, codes, _core.grid_store(grid, scales, w.shape[1])) / s
            error += np.trace(difference.astype(np.float64) @ h @ difference.T)
        plain = error if plain is None else plain
        if error < best[0]:
            best = (error, s, step / steps)
    return best[1], best[2], best[0] / plain


def test_awq_scale_is_the_grid_search():
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 64)) * np.exp(random.normal(size=64))
    h, magnitude = x.T @ x / len(x), np.abs(x).mean(0)
    weights = [(random.normal(size=(rows, 64)) * 0.1).astype(np.float32) for rows in (16, 8)]
    s, alpha, error = _core.awq_scale(
        [torch.from_numpy(w) for w in weights],
        ["int3_g32", "int3_g32"],
        torch.from_numpy(h),
        torch.from_numpy(magnitude),
        scale="reference",
    )
    expected, expected_alpha, expected_error = numpy_awq(weights, h, magnitude, "int3_g32")
    assert alpha == expected_alpha > 0
    assert error == pytest.approx(expected_error, rel=1e-4)  # float32 against float64 sums
    np.testing.assert_allclose(s.numpy(), expected, rtol=1e-6)
    assert error < 0.9


def test_inputs_of_one_producer_get_one_scale():
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.normal(size=(500, 64)) * np.exp(random.normal(size=64)))
    rows = (torch.arange(64) // 32 * 16 + torch.arange(64) % 16).tolist()  # two heads share each value head
    s, alpha, _ = _core.awq_scale(
        [torch.randn(16, 64)], ["int3_g32"], x.T @ x / 500, x.abs().mean(0), producer_rows=rows
    )
    assert alpha > 0
    for row in set(rows):
        assert len({float(s[i]) for i in range(64) if rows[i] == row}) == 1


def test_awq_refuses():
    w, h, m = torch.randn(4, 32), torch.eye(32), torch.ones(32)
    with pytest.raises(libqat.ArgumentError, match="steps of at least 1"):
        _core.awq_scale([w], ["q4_0"], h, m, steps=0)
    with pytest.raises(libqat.ArgumentError, match="rows of at least 0"):
        _core.awq_scale([w], ["q4_0"], h, m, rows=-1)
    with pytest.raises(libqat.ArgumentError, match="weights and as many grids"):
        _core.awq_scale([w], [], h, m)
    with pytest.raises(libqat.ArgumentError, match="a producer row for each of 32 inputs"):
        _core.awq_scale([w], ["q4_0"], h, m, producer_rows=[0])
    with pytest.raises(libqat.ArgumentError, match="expected a prepared Decoder"):
        libqat.awq(torch.nn.Linear(2, 2), m)


@pytest.mark.parametrize(
    ("tied", "changes"),
    [(True, {}), (False, {"attention_bias": True, "mlp_bias": True}), (True, {"num_key_value_heads": 4})],
    ids=["gqa", "biases-untied", "all-heads"],
)
def test_folding_leaves_the_float_model(tied, changes, tokens, tmp_path):
    model = make_llama(tied, **changes)
    with torch.no_grad():  # norms and biases of a fresh model are ones and zeros: nothing could go wrong
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    decoder = libqat.load_model(tmp_path).decoder
    expected = logits(decoder, tokens)
    before = {name: value.detach().clone() for name, value in decoder.parameters().items()}
    policy = {"rules": [{"match": ".*_proj", "weight": "int3_g32"}, {"match": ".*", "weight": "q8_0"}]}
    prepared = libqat.prepare(decoder, libqat.Policy.from_json(json.dumps(policy)).with_scale("learned"))
    folds = libqat.awq(prepared, tokens, compute_dtype="float32")
    prepared.set_enabled(False)
    # float32: each weight is multiplied and divided once
    torch.testing.assert_close(logits(decoder, tokens), expected, rtol=1e-4, atol=1e-5)
    assert len(folds) == 8 + (not tied)
    assert sum(fold.alpha > 0 for fold in folds) >= 4
    for fold in folds:
        assert 0 < fold.error <= 1
        moved = [not torch.equal(before[n], decoder.parameters()[n]) for n in fold.producers[:1]]
        assert all(moved) == (fold.alpha > 0) or fold.producers[0].endswith("_proj.weight")
    values = [fold for fold in folds if fold.producers[0].endswith("v_proj.weight")]
    assert values[0].weights == ["model.layers.0.self_attn.o_proj.weight"]
    assert len(values[0].producers) == (2 if "attention_bias" in changes else 1)


def test_awq_errs_less_than_plain_scales_and_gptq_may_follow(hf_folder, tokens):
    policy = {"rules": [{"match": ".*_proj", "weight": "int3_g32"}]}
    policy = libqat.Policy.from_json(json.dumps(policy)).with_scale("learned")
    expected = logits(libqat.load_model(hf_folder).decoder, tokens)

    def error(*methods):
        decoder = libqat.load_model(hf_folder).decoder
        prepared = libqat.prepare(decoder, policy)
        for method in methods:
            method(prepared, tokens, compute_dtype="float32")
        return float((logits(decoder, tokens) - expected).square().mean())

    with_awq = error(libqat.awq)
    assert with_awq < error(libqat.weighted_search)
    assert error(libqat.awq, libqat.gptq) < with_awq


# ---- any torch.nn model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU())
        self.second = torch.nn.Sequential(torch.nn.Linear(96, 32), torch.nn.Dropout(0.5))

    def forward(self, x):
        return self.second(self.first(x))


BATCHES = [torch.randn(40, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
LINEARS = libqat.Policy.from_json('{"rules": [{"match": ".*", "weight": "q4_0"}]}').with_scale("learned")


def solved(layer, x):
    h = x.flatten(0, -2).double()
    return _core.gptq_tensor(layer.weight.detach(), h.T @ h / len(h), "q4_0")


def test_any_model_in_one_pass():
    net = Net()
    x = torch.cat(BATCHES)
    with torch.no_grad():
        expected = [solved(net.first[0], x), solved(net.second[0], net.first(x))]
    prepared = libqat.prepare(net, LINEARS)
    found = libqat.gptq(prepared, BATCHES)
    assert [one.name for one in found] == ["first.0.weight", "second.0.weight"]
    for layer, (latent, scales) in zip((net.first[0], net.second[0]), expected, strict=True):
        # moments are float32 sums within a batch here, float64 there
        torch.testing.assert_close(layer.weight.detach(), latent, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.weight_scales.detach(), scales, rtol=1e-3, atol=1e-6)
    assert net.training
    assert prepared.quantizers()["first.0.weight"].enabled


def test_any_model_block_by_block():
    net = Net()
    prepared = libqat.prepare(net, LINEARS)
    latent, scales = solved(net.first[0], torch.cat(BATCHES))
    whole = copy.deepcopy(net)
    calls = []

    def forward(model, batch):
        calls.append(len(batch))
        model(batch)

    libqat.gptq(prepared, BATCHES, blocks=[net.first, net.second], forward=forward)
    torch.testing.assert_close(net.first[0].weight.detach(), latent, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        latent, scales = solved(whole.second[0], net.first(torch.cat(BATCHES)))
    torch.testing.assert_close(net.second[0].weight.detach(), latent, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net.second[0].weight_scales.detach(), scales, rtol=1e-3, atol=1e-6)
    assert calls == [40] * 6


def test_any_model_weighted():
    net = Net()
    prepared = libqat.prepare(net, LINEARS)
    before = net.first[0].weight.detach().clone()
    x = torch.cat(BATCHES).double()
    expected = _core.weighted_search_tensor(before, (x**2).mean(0), "q4_0")
    found = libqat.weighted_search(prepared, BATCHES)
    assert torch.equal(net.first[0].weight, before)
    torch.testing.assert_close(net.first[0].weight_scales.detach(), expected, rtol=1e-3, atol=1e-6)
    assert 0 < found[0].output_error < 0.2


def test_any_model_refuses():
    net = Net()
    prepared = libqat.prepare(net, LINEARS.with_scale("reference"))
    with pytest.raises(libqat.ArgumentError, match=r"gptq: first\.0\.weight: expected a policy with learned"):
        libqat.gptq(prepared, BATCHES)
    prepared = libqat.prepare(libqat.unprepare(prepared), LINEARS)
    with pytest.raises(libqat.ArgumentError, match=r"gptq: first\.0\.weight: expected a batch that reaches"):
        libqat.gptq(prepared, [])
    with pytest.raises(libqat.NumericError, match=r"gptq: first\.0\.weight: expected a finite hessian"):
        libqat.gptq(prepared, [BATCHES[0] * float("nan")])


# ---- the command line


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
    found = json.loads(works("quantize", hf_folder, "--method", method, *options))
    assert found["method"] == method
    assert found["calibration_tokens"] == 512
    assert found["bytes"] == path.stat().st_size
    key = "folds" if method == "awq" else "output_errors"
    assert len(found[key]) == (8 if method == "awq" else 14)

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


def test_calibration_windows():
    ids = torch.arange(1000)
    windows = ptq.calibration_windows(ids, 256, 64)
    assert windows.shape == (4, 64)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 1000 // 64 * 64 - 1
    assert ptq.calibration_windows(ids, 5000, 300).shape == (3, 300)
    assert ptq.calibration_windows(ids[:10], 5000, 300).shape == (1, 10)
