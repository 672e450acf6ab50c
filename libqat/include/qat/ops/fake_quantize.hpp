#pragma once

// w -> w_hat: the numbers that the deployed file will hold. Legend in qat/ops/ops.hpp.

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "qat/core/scheme.hpp"

namespace qat::ops {

/// w_hat = decode(encode(w, s), store(s)) in float32, s by the estimator's scale rule; float grids round each
/// value to their type. weight: float32[R, ...] of any strides -> contiguous float32 of the same shape.
/// scales: see ops.hpp. Gradients: the weight's by `estimator.kind`, kDifferentiated adding what passes
/// through the scale rule; the scales' as grid::Grid::backward defines it, times `estimator.scale_gradient`.
at::Tensor fake_quantize(const at::Tensor& weight, std::string_view grid, const Estimator& estimator = {},
                         std::string_view tensor = "", const at::Tensor& scales = {});

/// w_hat rounded once to `dtype`, without a gradient: for code that forms its own products. A plain function,
/// not a dispatcher operator. dtype: float32, bfloat16, float16 or float64.
at::Tensor quantized_weight(const at::Tensor& weight, at::ScalarType dtype, std::string_view grid,
                            ScaleRule scale = ScaleRule::kReference, std::string_view tensor = "",
                            const at::Tensor& scales = {});

/// dL/dw from dL/dw_hat with the scales of the forward pass: `grad` itself (kSte), or times the estimator's
/// factor of each weight. grad, weight: float32[R, ...] -> float32 of the same shape.
at::Tensor fake_quantize_backward(const at::Tensor& grad, const at::Tensor& weight, std::string_view grid,
                                  const Estimator& estimator = {}, std::string_view tensor = "",
                                  const at::Tensor& scales = {});

/// dL/dw as above, and dL/ds of learned scales: the sums of grid::Grid::backward times
/// `estimator.scale_gradient`, in which N counts the weights that share that very scale (of a K-quant's
/// sub-scale: those of its part of the block). scales: float32[R, G, P] -> {float32[R, ...], float32[R, G,
/// P]}.
std::tuple<at::Tensor, at::Tensor> fake_quantize_backward_scales(
    const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& scales, std::string_view grid,
    const Estimator& estimator = {}, std::string_view tensor = "");

}  // namespace qat::ops
