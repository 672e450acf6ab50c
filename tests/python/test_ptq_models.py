"""GPTQ and weighted search on whole models: libqat's decoder, and any torch.nn model."""

import copy
import json

import pytest
import torch
from conftest import logits, make_llama

import libqat
from libqat import _core, ptq

POLICY = libqat.Policy.preset("gguf-q4_0").with_scale("learned")
ORDER = ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]


def shipped(prepared):
    return libqat.dequantize(prepared.freeze("", ""))


def moments(model, layer, windows):
    """E[x x^T] of a layer's inputs, by a hook on a transformers model."""
    seen = []

    def record(_, inputs):
        seen.append(inputs[0].flatten(0, 1).double())

    hook = layer.register_forward_pre_hook(record)
    logits(model, windows)
    hook.remove()
    x = torch.cat(seen)
    return x.T @ x / len(x)


def test_each_layer_is_rounded_behind_those_before_it(loaded, windows):
    """A transformers model, rounded layer by layer in that order, sees the inputs of libqat's stages."""
    model = make_llama()
    prepared = libqat.prepare(loaded.decoder, POLICY)
    embedding = shipped(prepared)["model.embed_tokens.weight"]
    found = libqat.gptq(prepared, windows, compute_dtype="float32")
    result = shipped(prepared)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
    names = []
    for index, layer in enumerate(model.model.layers):
        for group in ORDER:
            modules = [getattr(layer.self_attn, n, None) or getattr(layer.mlp, n, None) for n in group]
            h = moments(model, modules[0], windows)
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


def test_the_methods_keep_their_order(hf_folder, loaded, windows):
    """On the calibration text: rounding errs most, then searched, weighted scales, compensated weights."""
    expected = logits(loaded.decoder, windows)
    policy = {"rules": [{"match": ".*_proj", "weight": "int3_g32"}]}
    errors = {}
    for method in ("reference", "search", "weighted", "gptq"):
        scale = method if method in ("reference", "search") else "learned"
        decoder = libqat.load_model(hf_folder).decoder
        prepared = libqat.prepare(decoder, libqat.Policy.from_json(json.dumps(policy)).with_scale(scale))
        if method == "weighted":
            libqat.weighted_search(prepared, windows, compute_dtype="float32")
        if method == "gptq":
            libqat.gptq(prepared, windows, compute_dtype="float32")
        errors[method] = float((logits(decoder, windows) - expected).square().mean())
    assert errors["gptq"] < errors["weighted"] < errors["search"] < errors["reference"], errors


def test_progress_and_stopping(loaded, windows):
    prepared = libqat.prepare(loaded.decoder, POLICY)
    seen = []
    libqat.gptq(prepared, windows, batch=4, progress=lambda *now: seen.append(now))
    stages = 4 * 2 + 1
    assert [now[0] for now in seen] == list(range(1, stages * 4 + 1))
    assert {now[1] for now in seen} == {stages * 4}
    assert seen[0][2] == "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ZeroDivisionError):
        libqat.gptq(prepared, windows, progress=lambda *_: 1 / 0)


def test_bad_arguments_are_named(hf_folder, windows):
    prepared = libqat.prepare(libqat.load_model(hf_folder).decoder, "gguf-q4_0")
    for method in (libqat.gptq, libqat.weighted_search, libqat.awq):
        with pytest.raises(libqat.ArgumentError, match=r"embed_tokens.weight: expected a policy with"):
            method(prepared, windows)
    prepared = libqat.prepare(libqat.load_model(hf_folder).decoder, POLICY)
    with pytest.raises(libqat.ArgumentError, match=r"windows: expected int64\[n, T\]"):
        libqat.gptq(prepared, windows[0])
    with pytest.raises(libqat.ArgumentError, match="batch: expected at least 1"):
        libqat.gptq(prepared, windows, batch=0)
    with pytest.raises(libqat.ArgumentError, match="expected ids in"):
        libqat.gptq(prepared, windows + 1000)
    prepared.decoder.parameters()["model.layers.1.input_layernorm.weight"].data[3] = float("nan")
    for method in (libqat.gptq, libqat.weighted_search, libqat.awq):
        with pytest.raises(
            libqat.NumericError, match=r"layers\.1\.self_attn\.q_proj\.weight: expected a finite"
        ):
            method(prepared, windows)


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


@pytest.mark.parametrize("method", [libqat.gptq, libqat.guided, libqat.weighted_search])
def test_any_model_keeps_float_types_of_a_policy(method):
    net = Net()
    before = net.first[0].weight.detach().clone()
    rules = [{"match": "first.*", "weight": "bf16"}, {"match": ".*", "weight": "q4_0"}]
    policy = libqat.Policy.from_json(json.dumps({"rules": rules})).with_scale("learned")
    prepared = libqat.prepare(net, policy)
    assert [one.name for one in method(prepared, BATCHES)] == ["second.0.weight"]
    assert torch.equal(net.first[0].weight, before)


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


def test_calibration_windows():
    ids = torch.arange(1000)
    windows = ptq.calibration_windows(ids, 256, 64)
    assert windows.shape == (4, 64)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 1000 // 64 * 64 - 1
    assert ptq.calibration_windows(ids, 5000, 300).shape == (3, 300)
    assert ptq.calibration_windows(ids[:10], 5000, 300).shape == (1, 10)
