#pragma once

// The decoder's element-wise steps as one pass each, with gradients. On the CPU, float32 and bfloat16 run in
// row_kernels; every other device and dtype runs the same formulas as a few tensor operations.
// Legend: B batch, T tokens, H heads, D head dimension, n the last dimension.

#include <ATen/core/Tensor.h>

#include "qat/models/config.hpp"

namespace qat::models {

/// weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in x's dtype and rounded once to
/// `dtype`. x: float32[..., n] (or float64), weight: [n] of x's dtype -> dtype[..., n]. Double backward
/// raises UnsupportedError on the CPU path, as for the others.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, at::ScalarType dtype);

/// Rotary positions, half-split: the pair (x[i], x[i + D/2]) turns by the angle of position t and frequency
/// i. x: [B, T, H, D], cos and sin: float32[T, D/2] -> x's dtype [B, T, H, D].
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

/// f(gate) * up, both [..., n] of one dtype, f(g) = g * sigmoid(g) or the GELU with tanh.
at::Tensor gated(const at::Tensor& gate, const at::Tensor& up, Activation activation);

}  // namespace qat::models
