#pragma once

// w -> w_hat: the numbers that the deployed file will hold. Legend in qat/ops/ops.hpp.

#include <ATen/core/Tensor.h>

#include <string_view>

#include "qat/core/scheme.hpp"

namespace qat::ops {

/// w_hat = decode(encode(w, s), store(s)) in float32, s by the estimator's scale rule; float grids round each
/// value to their type. weight: float32[R, ...] of any strides -> contiguous float32 of the same shape.
/// Gradient: by `estimator.kind` (identity, or masked to the grid's range); the scale is treated as a
/// constant.
at::Tensor fake_quantize(const at::Tensor& weight, std::string_view grid, const Estimator& estimator = {},
                         std::string_view tensor = "");

/// w_hat rounded once to `dtype`, without a gradient: for code that forms its own products. A plain function,
/// not a dispatcher operator. dtype: float32, bfloat16, float16 or float64.
at::Tensor quantized_weight(const at::Tensor& weight, at::ScalarType dtype, std::string_view grid,
                            ScaleRule scale = ScaleRule::kReference, std::string_view tensor = "");

/// dL/dw from dL/dw_hat: `grad` itself (kSte), or zero where the grid clips w (kClippedSte, with the scales
/// of the forward pass). grad, weight: float32[R, ...] -> float32 of the same shape.
at::Tensor fake_quantize_backward(const at::Tensor& grad, const at::Tensor& weight, std::string_view grid,
                                  const Estimator& estimator = {}, std::string_view tensor = "");

}  // namespace qat::ops
