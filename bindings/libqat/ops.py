"""Tensors in, tensors out: the operators of `torch.ops.libqat` with types and docstrings.

Each is an ordinary dispatcher operator with a backward made of operators of its own, so autograd,
`torch.autocast`, gradient checkpointing and `torch.compile` treat it like one of PyTorch's.

Dimensions: R rows (dimension 0 of a weight), N weights in a row (everything after dimension 0), G grid blocks
in a row, P scale parameters per block, I in and O out features.

`tensor` is the weight's name and appears in messages only. `estimator` says how the gradient passes the
rounding: "ste" (identity), "clipped_ste" (zero where the grid clips the weight), "trust_mask" or
"stable_qat". `scale` says where scales come from: "reference" (the consumer's own rule), "search" (the least
squared error of the weights), "differentiated" (as "reference", and the gradient also passes through the
rule) or "learned": then, and only then, `scales` holds them, float32 [R, G, P] ([1, 1, P] where the whole
tensor shares them), as `choose_scales` gives them. Their gradient is multiplied with what `scale_gradient`
says: "lsq", "tensor" or "plain". docs/numerics.md has the formulas.

Errors: `libqat.ArgumentError` for shapes, dtypes, unknown grids and widths that the block does not divide;
`libqat.NumericError`, naming tensor and row, for NaN, infinity or a scale beyond its stored type.
Differentiating twice raises `RuntimeError` ("derivative for libqat::... is not implemented").
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _core  # noqa: F401  (registers the operators)

__all__ = [
    "choose_scales",
    "dequantize",
    "fake_quantize",
    "fake_quantize_activation",
    "quantize",
    "quantized_embedding",
    "quantized_linear",
    "seq_start",
    "seq_tie",
]


def fake_quantize(
    weight: Tensor,
    grid: str,
    estimator: str = "ste",
    scale: str = "reference",
    tensor: str = "",
    scales: Tensor | None = None,
    scale_gradient: str = "lsq",
) -> Tensor:
    """The numbers that the deployed file will hold.

    weight: float32 [R, ...] of any strides -> contiguous float32 of the same shape. Gradients reach the
    weight and learned scales; scales of the other rules are constants, except that "differentiated" adds to
    the weight's gradient what passes through the rule.
    """
    return torch.ops.libqat.fake_quantize(weight, grid, estimator, scale, tensor, scales, scale_gradient)


def quantized_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: str,
    estimator: str = "ste",
    scale: str = "reference",
    tensor: str = "",
    scales: Tensor | None = None,
    scale_gradient: str = "lsq",
) -> Tensor:
    """`linear(input, fake_quantize(weight), bias)` that keeps only its arguments for backward.

    input: [..., I] float32, bfloat16 or float16; weight: float32 [O, I], the latent; bias: [O] or None.
    Returns [..., O] in input's dtype (under autocast: in the autocast dtype); the quantized weight is rounded
    once to that dtype. Gradients: input's in its dtype, weight's and scales' in float32, bias's in the bias's
    dtype.
    """
    return torch.ops.libqat.quantized_linear(
        input, weight, bias, grid, estimator, scale, tensor, scales, scale_gradient
    )


def quantized_embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    grid: str,
    estimator: str = "ste",
    scale: str = "reference",
    tensor: str = "",
    scales: Tensor | None = None,
    scale_gradient: str = "lsq",
) -> Tensor:
    """`embedding(indices, fake_quantize(weight))` that quantizes only the rows that the batch touches.

    indices: int64 [...]; weight: float32 [R, N], the latent. Returns float32 [..., N]. The gradient is dense
    float32 [R, N], that of scales [R, G, P]; rows equal to `padding_idx` (none when None or negative) receive
    none.
    """
    padding = -1 if padding_idx is None else padding_idx
    return torch.ops.libqat.quantized_embedding(
        indices, weight, padding, grid, estimator, scale, tensor, scales, scale_gradient
    )


def fake_quantize_activation(
    input: Tensor, format: str, scale: Tensor | None = None, tensor: str = ""
) -> Tensor:
    """The activations that a consumer's integer matmul sees, in input's shape and dtype.

    input: [..., I] float32, bfloat16 or float16 (under autocast cast to the autocast dtype). format:
    "int8_tensor_static": clamp(round(x / s), -128, 127) * s, half to even, in input's dtype, with `scale` s,
    a float32 scalar; 0 changes nothing. No gradient where the code is clamped; a scale that requires one gets
    LSQ's (arXiv:1902.08153).
    "int8_token": s = max|x| / 127 of each token, round(x / s) * s in float32.
    "q8_0": llama.cpp's blocks of 32, in float32; `libqat.NumericError` for NaN and infinities.
    """
    return torch.ops.libqat.fake_quantize_activation(input, format, scale, tensor)


def quantize(
    weight: Tensor, grid: str, scale: str = "reference", tensor: str = "", scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The stored form: codes int8 [R, N] and scales float32 [R, G, P], without gradient.

    weight: float32 [R, ...]. Grids with codes only. `dequantize` of the result equals `fake_quantize` with
    the same `scale` and `scales` bit for bit.
    """
    return torch.ops.libqat.quantize(weight, grid, scale, tensor, scales)


def choose_scales(weight: Tensor, grid: str, scale: str = "search", tensor: str = "") -> Tensor:
    """Unstored scales float32 [R, G, P] by a rule, without gradient: a start for learned scales.

    weight: float32 [R, ...]. Grids with codes only. `fake_quantize` with these as learned scales equals
    `fake_quantize` with the rule bit for bit.
    """
    return torch.ops.libqat.choose_scales(weight, grid, scale, tensor)


def seq_start(weight: Tensor, grid: str, scale: str = "search", tensor: str = "") -> Tensor:
    """Where the free parameters of SEQ start, float32 [R, G, F], without gradient.

    weight: float32 [R, ...]. scale: "reference", ParetoQ's alpha = max|w|, or "search", the least squared
    error. F: 1 (alpha) for mlx2_g*, mlx3_g* and mlx4_g*; 17 (d and 16 sub-scales) for q2_k. ArgumentError for
    other grids.
    """
    return torch.ops.libqat.seq_start(weight, grid, scale, tensor)


def seq_tie(free: Tensor, grid: str, tensor: str = "") -> Tensor:
    """The scales, float32 [R, G, P], that SEQ's free parameters stand for: for the rule "learned".

    free: float32 [R, G, F]. With them the levels are alpha / 2k * (1, 3, .. 2k - 1) of both signs, k half the
    number of levels, exactly (ParetoQ, arXiv:2502.02631). Gradients reach `free`; its rounding passes
    straight through.
    """
    return torch.ops.libqat.seq_tie(free, grid, tensor)


def dequantize(codes: Tensor, scales: Tensor, grid: str, tensor: str = "") -> Tensor:
    """What the consumer of the file computes: float32 [R, N].

    codes: int8 [R, N]; scales: float32 [R, G, P]. Raises `libqat.ArgumentError` for codes outside the grid.
    """
    return torch.ops.libqat.dequantize(codes, scales, grid, tensor)
