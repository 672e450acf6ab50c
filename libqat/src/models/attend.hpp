#pragma once

#include <ATen/core/Tensor.h>

namespace qat::models {

/// Causal attention: softmax(scale * q k^T + mask) v. The T queries stand at the last T of the S positions; a
/// query reads its own position and those before it, with a window > 0 only the last `window` of them. Query
/// head j of H reads key-value head j * K / H. q: [B, H, T, D], k and v: [B, K, S, D] of one dtype, T <= S ->
/// [B, H, T, D]. Windows shorter than T cost T * window, not T * T.
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t window,
                  double scale);

}  // namespace qat::models
