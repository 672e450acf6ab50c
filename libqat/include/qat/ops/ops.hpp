#pragma once

// Tensors in, tensors out: the operators `torch.ops.libqat.*`. Each has CPU and meta kernels, an any-device
// reference composed of the grid's own functions, an autograd rule whose backward is an operator of its own,
// and an autocast rule (inputs go to the autocast type, latents stay float32).
//
// Legend: R rows (dimension 0 of a weight), N weights in a row (everything after dimension 0), G grid blocks
// in a row, P scale parameters per block, T tokens (all leading dimensions of an input), I in and O out
// features.
//
// Every function takes `tensor`, the weight's name, for messages only. Errors: ArgumentError for shapes,
// dtypes, unknown grids and widths the block does not divide; NumericError naming tensor and row for NaN,
// infinity or a scale beyond its stored type. Double backward raises.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "qat/core/scheme.hpp"

namespace qat::ops {

/// w_hat = decode(encode(w), store(choose(w))): the numbers that the deployed file will hold, in float32.
/// weight: float32[R, ...] contiguous -> float32 of the same shape. Float grids round to their type.
/// Gradient: by `estimator` (identity, or masked to the grid's range); the scale is treated as a constant.
at::Tensor fake_quantize(const at::Tensor& weight, std::string_view grid,
                         EstimatorKind estimator = EstimatorKind::kSte, std::string_view tensor = "");

/// y = input @ w_hat^T + bias, without keeping w_hat: it lives in a reused scratch buffer and is recomputed
/// in backward. input: [..., I] float32, bfloat16 or float16; weight: float32[O, I] latent; bias: [O] or
/// none. y: [..., O] in input's dtype; w_hat is rounded once to that dtype. Gradients: input's in its dtype,
/// weight's in float32, bias's in the bias's dtype.
at::Tensor quantized_linear(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, std::string_view grid,
                            EstimatorKind estimator = EstimatorKind::kSte, std::string_view tensor = "");

/// y[t] = w_hat[indices[t]]; only the rows that the batch touches are quantized. indices: int64 [...];
/// weight: float32[R, N] latent; y: float32 [..., N]. Gradient: dense float32[R, N]; rows equal to
/// `padding_idx` (or none when negative) receive none.
at::Tensor quantized_embedding(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                               std::string_view grid, EstimatorKind estimator = EstimatorKind::kSte,
                               std::string_view tensor = "");

/// The stored form. weight: float32[R, ...] -> codes: int8[R, N], scales: float32[R, G, P] after `store`.
/// Integer grids only. dequantize(quantize(w)) equals fake_quantize(w) bit for bit.
std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& weight, std::string_view grid,
                                            std::string_view tensor = "");

/// codes: int8[R, N], scales: float32[R, G, P] -> float32[R, N]. ArgumentError for codes outside the grid.
at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, std::string_view grid,
                      std::string_view tensor = "");

}  // namespace qat::ops
