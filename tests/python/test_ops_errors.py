"""What the operators refuse: each error names operator, tensor and row or argument."""

import pytest
import torch

import libqat
from libqat import ops

CODED_GRIDS = ["q4_0", "q4_1", "q8_0", "int8_channel", "int4_channel", "int2_channel", "int3_g64"]
GRIDS = ["f32", "f16", "bf16", *CODED_GRIDS]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("grid", GRIDS)
def test_values_that_are_not_finite_are_refused(grid, value):
    weight = normal(100, 64)
    weight[97, 63] = weight[98, 0] = value
    expected = r": a\.weight: row 97 is not finite$"
    with pytest.raises(libqat.NumericError, match="^fake_quantize" + expected):
        ops.fake_quantize(weight, grid, tensor="a.weight")
    for x in (normal(2, 64), normal(2, 64, dtype=torch.bfloat16), normal(2, 64, dtype=torch.float16)):
        with pytest.raises(libqat.NumericError, match="^quantized_linear" + expected):
            ops.quantized_linear(x, weight, None, grid, tensor="a.weight")
    if grid in CODED_GRIDS:
        with pytest.raises(ArithmeticError, match="^quantize" + expected):
            ops.quantize(weight, grid, tensor="a.weight")


@pytest.mark.parametrize("grid", ["f16", "q4_0", "q4_1", "q8_0"])
def test_scales_beyond_their_stored_type_are_refused(grid):
    weight = normal(3, 32)
    weight[1, 4] = 1e38  # float16 ends at 65504
    with pytest.raises(libqat.NumericError, match=r"^fake_quantize: weight: row 1 .*beyond its stored type$"):
        ops.fake_quantize(weight, grid)


X, W, INDEX = normal(2, 64), normal(48, 64), torch.tensor([1])
BAD_CALLS = [
    (lambda: ops.fake_quantize(W, "q4_9"), r"q4_0, .*got \"q4_9\""),
    (
        lambda: ops.fake_quantize(W, "q4_0", "lsqq"),
        r"estimator: expected one of ste, clipped_ste, trust_mask, stable_qat, got",
    ),
    (lambda: ops.fake_quantize(W.double(), "q4_0"), r"float32 latent .*got Double\[48, 64\]"),
    (lambda: ops.fake_quantize(W[0], "q4_0"), r"at least 2 dimensions, got Float\[64\]"),
    (lambda: ops.fake_quantize(W[:, :33], "q4_0"), r"blocks of 32 \(q4_0\) divide, got Float\[48, 33\]"),
    (lambda: ops.fake_quantize(W[:0], "q4_0"), r"at least one weight, got Float\[0, 64\]"),
    (lambda: ops.fake_quantize(W[:, :0], "int4_channel"), r"at least one weight, got Float\[48, 0\]"),
    (lambda: ops.quantize(W, "bf16"), r"^quantize: weight: expected a grid with codes, got bf16"),
    (lambda: ops.quantized_linear(X[:, :32], W, None, "q4_0"), r"last dimension of 64, got Float\[2, 32\]"),
    (lambda: ops.quantized_linear(X.double(), W, None, "q4_0"), r"input of float32, .*got Double\[2, 64\]"),
    (lambda: ops.quantized_linear(X[0, 0], W, None, "q4_0"), r"last dimension of 64, got Float\[\]"),
    (lambda: ops.quantized_linear(X, W.reshape(48, 2, 32), None, "q4_0"), r"of 2 dimensions"),
    (lambda: ops.quantized_linear(X, W, W[0], "q4_0"), r"bias of .*last dimension of 48, got Float\[64\]"),
    (lambda: ops.quantized_linear(X, W, W, "q4_0"), r"bias of 1 dimension, got Float\[48, 64\]"),
    (lambda: ops.quantized_embedding(INDEX + 47, W, None, "q4_0"), r"indices in \[0, 48\), got 48"),
    (lambda: ops.quantized_embedding(INDEX - 2, W, None, "q4_0"), r"indices in \[0, 48\), got -1"),
    (lambda: ops.quantized_embedding(INDEX.int(), W, None, "q4_0"), r"indices of int64, got Int\[1\]"),
    (lambda: ops.quantized_embedding(INDEX, W, 48, "q4_0"), r"padding_idx below .*got 48"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(libqat.ArgumentError, match=message):
        call()


def test_dequantize_checks_what_it_decodes():
    codes, scales = ops.quantize(W, "q4_0")
    codes[3, 5] = 8
    with pytest.raises(
        libqat.ArgumentError, match=r"dequantize: t: expected codes in \[-8, 7\] in row 3, got 8"
    ):
        ops.dequantize(codes, scales, "q4_0", tensor="t")
    for bad_codes, bad_scales in [(codes.int(), scales), (codes[:, :33], scales), (codes, scales[:, :1])]:
        with pytest.raises(libqat.ArgumentError, match=r"^dequantize: weight: expected"):
            ops.dequantize(bad_codes, bad_scales, "q4_0")


def test_backward_operators_check_their_arguments():
    backward = torch.ops.libqat
    with pytest.raises(libqat.ArgumentError, match=r"grad like the weight Float\[48, 64\]"):
        backward.fake_quantize_backward(W[:2], W, "q4_0")
    with pytest.raises(libqat.ArgumentError, match=r"grad_output of .*last dimension of 48"):
        backward.quantized_linear_grad_input(X, W, "q4_0")
    with pytest.raises(libqat.ArgumentError, match=r"grad_output of input's dtype"):
        backward.quantized_linear_grad_weight(normal(2, 48, dtype=torch.bfloat16), X, W, "q4_0")
    with pytest.raises(libqat.ArgumentError, match=r"grad_output of .*last dimension of 64"):
        backward.quantized_embedding_backward(normal(1, 8), INDEX, W, -1, "q4_0")
