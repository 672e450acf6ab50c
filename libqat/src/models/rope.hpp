#pragma once

#include <ATen/core/Tensor.h>

#include "qat/arch/rope.hpp"

namespace qat::models {

/// The angles of rotary positions: position t turns the pair i of a head of D by
/// t * theta^(-2i/D) / divisor_i. (Su et al. 2021, arXiv:2104.09864; pairs are half-split, as in Hugging
/// Face.)
struct RopeTable {
  at::Tensor cos;  ///< float32[T, D/2]
  at::Tensor sin;  ///< float32[T, D/2]
};

/// For positions start .. start + tokens - 1.
RopeTable make_rope(int64_t start, int64_t tokens, int64_t head_dim, const arch::Rope& rope,
                    at::Device device);

}  // namespace qat::models
