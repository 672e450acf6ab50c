"""Searched scales on their way through operators, training, reports and files."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, linear

import libqat
from libqat import ops

GRIDS = ["q4_0", "q8_0", "q2_0", "int4_g32", "int2_channel"]
SEARCH = {
    "rules": [{"match": ".*", "weight": "q4_0"}],
    "estimator": {"kind": "clipped_ste", "scale": "search"},
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_errors(weight, grid, scale):
    """Sum of squared errors of each row, in float64."""
    return (ops.fake_quantize(weight, grid, scale=scale) - weight).double().square().sum(1)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_operator_uses_the_searched_scales(grid):
    weight, x, indices = normal(48, 64), normal(5, 64, seed=1), torch.tensor([[3, 47], [0, 3]])
    codes, scales = ops.quantize(weight, grid, scale="search")
    w_hat = ops.fake_quantize(weight, grid, scale="search")
    assert torch.equal(w_hat, ops.dequantize(codes, scales, grid))
    assert not torch.equal(w_hat, ops.fake_quantize(weight, grid))
    # rows are sums of blocks, none of which is worse; float32 sums choose, so that equal ones may differ in
    # the last places
    assert (row_errors(weight, grid, "search") <= row_errors(weight, grid, "reference") * (1 + 1e-6)).all()
    y = ops.quantized_linear(x, weight, None, grid, scale="search")
    assert torch.equal(y, linear(x, w_hat))
    rows = ops.quantized_embedding(indices, weight, None, grid, scale="search")
    assert torch.equal(rows, embedding(indices, w_hat))


def test_gradients_belong_to_the_searched_scales():
    weight, x = normal(48, 64), normal(5, 64, seed=1).requires_grad_()
    codes, scales = ops.quantize(weight, "int2_channel", scale="search")
    place = weight.double() / scales[:, :, 0].double()
    inside = (place >= -2 - 1e-5) & (place <= 1 + 1e-5)
    reference = ops.fake_quantize(weight.clone().requires_grad_(), "int2_channel", "clipped_ste")
    assert not inside.all()
    upstream = normal(5, 48, seed=2)

    latent = weight.clone().requires_grad_()
    ops.quantized_linear(x, latent, None, "int2_channel", "clipped_ste", "search").backward(upstream)
    torch.testing.assert_close(latent.grad, inside * (upstream.t() @ x.detach()))
    w_hat = ops.dequantize(codes, scales, "int2_channel")
    torch.testing.assert_close(x.grad, upstream @ w_hat)
    assert not torch.equal(w_hat, reference.detach())

    table = weight.clone().requires_grad_()
    ops.quantized_embedding(
        torch.arange(48), table, None, "int2_channel", "clipped_ste", "search"
    ).sum().backward()
    assert torch.equal(table.grad, inside.float())
    whole = weight.clone().requires_grad_()
    ops.fake_quantize(whole, "int2_channel", "clipped_ste", "search").sum().backward()
    assert torch.equal(whole.grad, inside.float())


def test_an_unknown_rule_is_refused_by_every_operator():
    weight, x = normal(4, 32), normal(2, 32)
    for call in (
        lambda: ops.fake_quantize(weight, "q4_0", scale="serch"),
        lambda: ops.quantize(weight, "q4_0", scale="serch"),
        lambda: ops.quantized_linear(x, weight, None, "q4_0", scale="serch"),
        lambda: ops.quantized_embedding(torch.tensor([0]), weight, None, "q4_0", scale="serch"),
        lambda: torch.ops.libqat.quantized_linear_grad_input(normal(2, 4), weight, "q4_0", "serch"),
        lambda: ops.fake_quantize(weight.to("meta"), "q4_0", scale="serch"),
    ):
        with pytest.raises(
            libqat.ArgumentError, match='reference, search, differentiated, learned, seq, got "serch"'
        ):
            call()


def test_a_policy_carries_the_rule():
    policy = libqat.Policy.from_json(json.dumps(SEARCH))
    assert (policy.estimator, policy.scale) == ("clipped_ste", "search")
    assert json.loads(policy.to_json()) == SEARCH
    assert policy.with_scale("reference").scale == "reference"
    assert json.loads(policy.with_scale("reference").to_json())["estimator"] == {"kind": "clipped_ste"}
    assert policy.with_scale("search") == policy
    preset = libqat.Policy.preset("gguf-q4_0")
    assert preset.scale == "reference"
    assert libqat.Policy.from_json(preset.with_scale("search").to_json()).scale == "search"
    with pytest.raises(libqat.ArgumentError, match=r"estimator\.scale: expected one of reference, search"):
        libqat.Policy.from_json('{"rules": [], "estimator": {"kind": "ste", "scale": "best"}}')


def test_training_and_freezing_see_the_same_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 64, bias=False), nn.Linear(64, 32))
    prepared = libqat.prepare(model, SEARCH)
    assert {q.scale for q in prepared.quantizers().values()} == {"search"}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.arange(16)).square().mean().backward()
    optimizer.step()
    weights = libqat.dequantize(libqat.freeze(prepared))
    for name, latent in model.named_parameters():
        if latent.dim() == 2:
            assert torch.equal(weights[name], ops.fake_quantize(latent.detach(), "q4_0", scale="search"))
            assert not torch.equal(weights[name], ops.fake_quantize(latent.detach(), "q4_0"))
    tokens = torch.arange(16)
    shipped = linear(
        linear(weights["0.weight"][tokens], weights["1.weight"]), weights["2.weight"], model[2].bias
    )
    torch.testing.assert_close(model(tokens), shipped)


def test_the_report_measures_what_ships():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    errors = {}
    for scale in ("reference", "search"):
        policy = libqat.Policy.from_json(json.dumps(SEARCH)).with_scale(scale)
        prepared = libqat.prepare(model, policy)
        errors[scale] = prepared.report()[0].relative_error
        latent = model[0].weight.detach()
        w_hat = libqat.dequantize(libqat.freeze(prepared))["0.weight"]
        expected = (w_hat - latent).double().norm() / latent.double().norm()
        assert errors[scale] == pytest.approx(float(expected), rel=1e-9)
        libqat.unprepare(model)
    assert errors["search"] < errors["reference"]


def test_a_compiled_graph_searches_too():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    libqat.prepare(model, SEARCH)
    x = normal(3, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x)
    assert torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
