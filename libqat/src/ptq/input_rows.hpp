#pragma once

// Inputs of layers as rows that count.

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <string>

#include "ptq/check.hpp"

namespace qat::ptq {

inline void check_input(const char* function, const at::Tensor& input, int64_t width) {
  if (input.dim() >= 1 && input.size(-1) == width && input.is_floating_point()) return;
  fail({function, "input"}, "floats [..., " + std::to_string(width) + "]", describe(input));
}

/// [n, N] on the CPU, in float32 or the dtype named.
inline at::Tensor input_rows(const at::Tensor& input, at::ScalarType dtype = at::kFloat) {
  return input.detach().reshape({-1, input.size(-1)}).to(at::kCPU, dtype);
}

/// float32[n, 1] on the CPU: how often each row counts.
inline at::Tensor input_factors(const at::Tensor& weights) {
  return weights.reshape({-1, 1}).to(at::kCPU, at::kFloat);
}

}  // namespace qat::ptq
