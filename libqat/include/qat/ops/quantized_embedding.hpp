#pragma once

// An embedding that quantizes only the rows a batch touches. Legend in qat/ops/ops.hpp.

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "qat/core/scheme.hpp"

namespace qat::ops {

/// y[t] = w_hat[indices[t]]; only the rows that the batch touches are quantized. indices: int64[...];
/// weight: float32[R, N] latent; y: float32[..., N], under autocast too. Gradient: dense float32[R, N]; rows
/// equal to `padding_idx` (none when negative) receive none. ArgumentError for an index outside [0, R).
at::Tensor quantized_embedding(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                               std::string_view grid, const Estimator& estimator = {},
                               std::string_view tensor = "", const at::Tensor& scales = {});

/// dL/dweight: the gradients of a row's uses summed and passed on as fake_quantize_backward does.
/// grad_output: float32[..., N], indices: int64[...], weight: float32[R, N] -> float32[R, N].
at::Tensor quantized_embedding_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                        const at::Tensor& weight, int64_t padding_idx, std::string_view grid,
                                        const Estimator& estimator = {}, std::string_view tensor = "",
                                        const at::Tensor& scales = {});

/// dL/dweight, and dL/dscales: 0 in rows that no index names. scales: float32[R, G, P].
std::tuple<at::Tensor, at::Tensor> quantized_embedding_backward_scales(
    const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
    const at::Tensor& scales, int64_t padding_idx, std::string_view grid, const Estimator& estimator = {},
    std::string_view tensor = "");

}  // namespace qat::ops
