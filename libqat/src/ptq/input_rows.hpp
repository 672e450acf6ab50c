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

/// float32[n, N] on the CPU, times the roots of the weights where there are any.
inline at::Tensor input_rows(const at::Tensor& input, const at::Tensor& weights) {
  const at::Tensor x = input.detach().reshape({-1, input.size(-1)}).to(at::kCPU, at::kFloat);
  return weights.defined() ? x * weights.reshape({-1, 1}).to(at::kFloat).sqrt() : x;
}

}  // namespace qat::ptq
