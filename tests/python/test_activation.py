"""Fake-quantized activations against their closed formulas, and against a consumer's own code."""

import numpy as np
import pytest
import torch

import libqat
from libqat import _core, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_static_rounds_half_to_even_and_clamps():
    scale = torch.tensor(0.5)
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 63.5, 63.7, 100.0, -64.0, -64.2, -100.0, 0.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 0.0, -1.0, 63.5, 63.5, 63.5, -64.0, -64.0, -64.0, 0.0])
    assert torch.equal(ops.fake_quantize_activation(x, "int8_tensor_static", scale), expected)
    assert torch.equal(ops.fake_quantize_activation(x, "int8_tensor_static", torch.tensor(0.0)), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_equals_transformers(dtype):
    quant = pytest.importorskip("transformers.integrations.gemma_quant")
    for seed, scale in enumerate((0.0, 0.013, 0.02, 1.7)):
        x, s = normal(7, 40, seed=seed, dtype=dtype), torch.tensor(scale)
        assert torch.equal(ops.fake_quantize_activation(x, "int8_tensor_static", s), quant.apply_srq(x, s))


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_static_gradient_stops_where_the_code_is_clamped(scale):
    x = torch.tensor([63.7, 63.8, 100.0, -64.2, -64.3, 1.0, float("inf")], requires_grad=True)
    upstream = torch.arange(1.0, 8.0)
    ops.fake_quantize_activation(x, "int8_tensor_static", torch.tensor(scale)).backward(upstream)
    # 63.7 / 0.5 = 127.4 and -64.2 / 0.5 = -128.4 round to legal codes
    inside = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]) if scale else torch.ones(7)
    assert torch.equal(x.grad, upstream * inside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_uses_its_own_largest_magnitude(dtype):
    x = normal(2, 3, 40, dtype=dtype) * torch.tensor([1.0, 1e-3, 50.0]).to(dtype)[:, None]
    x[0, 0] = 0
    x[1, 2, 5] = -x[1, 2].abs().max()
    got = ops.fake_quantize_activation(x, "int8_token")
    assert got.dtype == dtype
    exact = x.double()
    scale = exact.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, exact / scale, 0.0).round().clamp(-128, 127)
    # float32 rounds scale, quotient and product once each, and dtype rounds the result
    bound = 127 * scale * (3 * 2.0**-24 + torch.finfo(dtype).eps)
    # a quotient within float32's rounding of a tie may go either way
    tie = ((torch.where(scale > 0, exact / scale, 0.0) % 1) - 0.5).abs() < 2e-5
    assert (((got.double() - codes * scale).abs() <= bound) | tie).all()
    assert torch.equal(got[0, 0], torch.zeros(40, dtype=dtype))
    assert tie.double().mean() < 0.01


def test_token_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    expected = torch.tensor([[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -127.0]])
    assert torch.equal(ops.fake_quantize_activation(x, "int8_token"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_those_of_the_grid(dtype):
    x = normal(2, 3, 64, dtype=dtype)
    rows = x.float().reshape(-1, 64).numpy()
    expected = torch.from_numpy(np.array(_core.grid_fake_quantize("q8_0", rows))).to(dtype).view_as(x)
    assert torch.equal(ops.fake_quantize_activation(x, "q8_0"), expected)
    assert torch.equal(ops.fake_quantize_activation(x.transpose(0, 1), "q8_0"), expected.transpose(0, 1))


@pytest.mark.parametrize("format", ["int8_token", "q8_0"])
def test_dynamic_formats_pass_the_gradient(format):
    x = normal(3, 64).requires_grad_()
    upstream = normal(3, 64, seed=1)
    ops.fake_quantize_activation(x, format).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_autocast_casts_first():
    x = normal(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.fake_quantize_activation(x, "int8_token")
    assert torch.equal(got, ops.fake_quantize_activation(x.bfloat16(), "int8_token"))


def test_an_empty_batch_stays_empty():
    for format, scale in (("int8_tensor_static", torch.tensor(1.0)), ("int8_token", None), ("q8_0", None)):
        assert ops.fake_quantize_activation(torch.empty(0, 32), format, scale).shape == (0, 32)


def test_errors_name_the_layer():
    x = normal(2, 32)
    for arguments, message in [
        ((x, "int4_token"), r"one of int8_tensor_static, int8_token, q8_0, got \"int4_token\""),
        ((x, "int8_tensor_static"), "a scale for int8_tensor_static, got none"),
        ((x, "q8_0", torch.tensor(1.0)), "no scale for q8_0, got one"),
        ((x, "int8_tensor_static", torch.ones(2)), r"a scale of float32\[\] on cpu, got Float\[2\]"),
        ((normal(2, 33), "q8_0"), r"blocks of 32 \(q8_0\) divide, got Float\[2, 33\]"),
        ((x.double(), "int8_token"), r"float32, bfloat16 or float16 .* got Double\[2, 32\]"),
    ]:
        with pytest.raises(libqat.ArgumentError, match=message):
            ops.fake_quantize_activation(*arguments)
    x[1, 3] = float("nan")
    with pytest.raises(libqat.NumericError, match=r"up\.weight: row 1 is not finite"):
        ops.fake_quantize_activation(x, "q8_0", tensor="up.weight")


def lsq_scale_gradient(x, scale, upstream):
    """The closed formula of LSQ (arXiv:1902.08153) for 8-bit activations, in float64."""
    x, upstream, s = x.double(), upstream.double(), float(torch.tensor(scale))
    code = (x / s).round()
    slope = torch.where((code >= -128) & (code <= 127), code - x / s, code.clamp(-128, 127))
    return (upstream * slope).sum() / (127 * x.shape[-1]) ** 0.5


@pytest.mark.parametrize("scale", [0.004, 0.013, 0.4])
def test_gradient_of_a_static_scale(scale):
    x, upstream = normal(5, 3, 64, seed=3), normal(5, 3, 64, seed=4)
    s = torch.tensor(scale, requires_grad=True)
    leaf = x.clone().requires_grad_()
    ops.fake_quantize_activation(leaf, "int8_tensor_static", s).backward(upstream)
    # 960 float32 terms of at most 128, each rounded a few times
    expected = lsq_scale_gradient(x, scale, upstream)
    assert torch.allclose(s.grad.double(), expected, rtol=1e-5, atol=1e-6)
    alone = x.clone().requires_grad_()
    ops.fake_quantize_activation(alone, "int8_tensor_static", s.detach()).backward(upstream)
    assert torch.equal(leaf.grad, alone.grad)


def test_a_scale_of_zero_has_no_gradient():
    s = torch.tensor(0.0, requires_grad=True)
    x = normal(4, 8).requires_grad_()
    ops.fake_quantize_activation(x, "int8_tensor_static", s).sum().backward()
    assert s.grad == 0
    assert torch.equal(x.grad, torch.ones(4, 8))


def test_a_scale_moves_against_its_gradient_towards_less_error():
    """With squared error as the loss, LSQ's gradient is its derivative where no code changes."""
    x = normal(64, 16, seed=7)
    s = torch.tensor(0.05, requires_grad=True)
    optimizer = torch.optim.SGD([s], lr=5.0)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (ops.fake_quantize_activation(x, "int8_tensor_static", s) - x).square().mean()
        error.backward()
        errors.append(error.item())
        optimizer.step()
    assert errors[-1] < errors[0] / 2
