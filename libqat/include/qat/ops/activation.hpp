#pragma once

// x -> x_hat: the activations that a consumer's integer matmul sees. Legend in qat/ops/ops.hpp.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

namespace qat::ops {

/// One scale per tensor, found once by an observer. x_hat = clamp(round(x / s), -128, 127) * s, half to even,
/// in x's dtype with s rounded to it; a scale of 0 (not calibrated) changes nothing. (Gemma mobile's "static
/// range quantization": transformers/integrations/gemma_quant.py apply_srq)
inline constexpr std::string_view kInt8TensorStatic = "int8_tensor_static";
/// One scale per token (all but the last dimension), from its own values: s = max|x| / 127, x_hat =
/// round(x / s) * s, half to even, in float32 and rounded once to x's dtype; a token of zeros stays zero.
inline constexpr std::string_view kInt8Token = "int8_token";
/// llama.cpp's blocks: each 32 consecutive values of the last dimension through the grid q8_0 in float32,
/// then rounded once to x's dtype. The last dimension is a multiple of 32.
inline constexpr std::string_view kQ8_0 = "q8_0";

/// The formats that fake_quantize_activation takes.
std::vector<std::string_view> activation_formats();
/// Throws ArgumentError, listing all formats, when there is none of that name.
void check_activation_format(std::string_view format);

/// x_hat. input: [..., I] float32, bfloat16 or float16 of any strides -> the same shape and dtype. scale:
/// float32 scalar, for int8_tensor_static only, a constant to the gradient. Gradient: identity, except that
/// int8_tensor_static passes none where the code is clamped. Under autocast the input is cast to the autocast
/// dtype first. NaN and infinities pass through int8_tensor_static and spoil their own token in int8_token;
/// q8_0 throws NumericError naming tensor and token. `tensor` is the layer's weight, for messages.
at::Tensor fake_quantize_activation(const at::Tensor& input, std::string_view format,
                                    const std::optional<at::Tensor>& scale = std::nullopt,
                                    std::string_view tensor = "");

/// dL/dinput of int8_tensor_static: grad where round(input / scale) is in -128..127 or scale is 0, else 0.
/// grad: like input.
at::Tensor fake_quantize_activation_backward(const at::Tensor& grad, const at::Tensor& input,
                                             const at::Tensor& scale, std::string_view tensor = "");

}  // namespace qat::ops
