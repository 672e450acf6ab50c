#pragma once

// x -> x_hat: the activations that a consumer's integer matmul sees. Legend in qat/ops/ops.hpp.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "qat/core/activation.hpp"

namespace qat::ops {

/// int8_tensor_static: x_hat = clamp(round(x / s), -128, 127) * s, half to even, in x's dtype with s rounded
/// to it; a scale of 0 (not calibrated) changes nothing. (Gemma mobile's "static range quantization":
/// transformers/integrations/gemma_quant.py apply_srq)
/// int8_token: s = max|x| / 127 of each token (all but the last dimension), x_hat = round(x / s) * s, half to
/// even, in float32 and rounded once to x's dtype; a token of zeros stays zero.
/// q8_0: each 32 consecutive values of the last dimension through the grid q8_0 in float32, then rounded once
/// to x's dtype. The last dimension is a multiple of 32.
using qat::activation_formats;
using qat::check_activation_format;
using qat::kInt8TensorStatic;
using qat::kInt8Token;
using qat::kQ8_0;

/// x_hat. input: [..., I] float32, bfloat16 or float16 of any strides -> the same shape and dtype. scale:
/// float32 scalar, for int8_tensor_static only. Gradient: identity, except that int8_tensor_static passes
/// none where the code is clamped, and gives a scale that requires it the one of `..._backward_scale`. Under
/// autocast the input is cast to the autocast dtype first. NaN and infinities pass through int8_tensor_static
/// and spoil their own token in int8_token; q8_0 throws NumericError naming tensor and token. `tensor` is the
/// layer's weight, for messages.
at::Tensor fake_quantize_activation(const at::Tensor& input, std::string_view format,
                                    const std::optional<at::Tensor>& scale = std::nullopt,
                                    std::string_view tensor = "");

/// dL/dinput of int8_tensor_static: grad where round(input / scale) is in -128..127 or scale is 0, else 0.
/// grad: like input.
at::Tensor fake_quantize_activation_backward(const at::Tensor& grad, const at::Tensor& input,
                                             const at::Tensor& scale, std::string_view tensor = "");

/// The same, and dL/dscale, float32 scalar (LSQ, arXiv:1902.08153): the sum over all elements of grad times
///   round(x / s) - x / s  inside,  -128 or 127  where the code is clamped,
/// divided by sqrt(127 I), I the size of the last dimension; 0 for a scale of 0.
std::tuple<at::Tensor, at::Tensor> fake_quantize_activation_backward_scale(const at::Tensor& grad,
                                                                           const at::Tensor& input,
                                                                           const at::Tensor& scale,
                                                                           std::string_view tensor = "");

}  // namespace qat::ops
