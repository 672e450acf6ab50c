#pragma once

// A linear layer on quantized weights that keeps no quantized weight. Legend in qat/ops/ops.hpp.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "qat/core/scheme.hpp"

namespace qat::ops {

/// y = input @ w_hat^T + bias, without keeping w_hat: it lives in a reused scratch buffer and is recomputed
/// in backward. input: [..., I] float32, bfloat16 or float16; weight: float32[O, I] latent; bias: [O] of any
/// of these dtypes, or none. y: [..., O] in input's dtype; w_hat and bias are rounded once to that dtype.
/// Saved for backward: input, weight and scales. Gradients: input's in its dtype, weight's in float32 (a
/// product in the compute dtype), bias's in the bias's dtype. Under autocast the input is cast to the
/// autocast dtype first, and y has that dtype.
at::Tensor quantized_linear(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, std::string_view grid,
                            const Estimator& estimator = {}, std::string_view tensor = "",
                            const at::Tensor& scales = {});

/// dL/dinput = grad_output @ w_hat, in grad_output's dtype, which is the forward's compute dtype.
/// grad_output: [..., O] float32, bfloat16 or float16; weight: float32[O, I] -> [..., I].
at::Tensor quantized_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight,
                                       std::string_view grid, ScaleRule scale = ScaleRule::kReference,
                                       std::string_view tensor = "", const at::Tensor& scales = {});

/// dL/dweight = fake_quantize_backward(grad_output^T @ input) in float32.
/// grad_output: [..., O] and input: [..., I] of one dtype; weight: float32[O, I] -> float32[O, I].
at::Tensor quantized_linear_grad_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                        const at::Tensor& weight, std::string_view grid,
                                        const Estimator& estimator = {}, std::string_view tensor = "",
                                        const at::Tensor& scales = {});

/// dL/dweight and dL/dscales from one product: fake_quantize_backward_scales(grad_output^T @ input).
std::tuple<at::Tensor, at::Tensor> quantized_linear_grad_scales(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& scales, std::string_view grid, const Estimator& estimator = {},
    std::string_view tensor = "");

}  // namespace qat::ops
