#pragma once

// The arithmetic of forward and backward passes, while latents and moments stay float32.

#include <ATen/core/Tensor.h>

#include <string_view>

namespace qat::train {

/// kFloat for "float32", kBFloat16 for "bfloat16". "auto" is bfloat16 on an accelerator and on a CPU that
/// multiplies it (AVX512-BF16 or AMX), else float32. ArgumentError for another name.
at::ScalarType compute_dtype(std::string_view name, at::Device device = at::kCPU);

/// Runs what happens in its lifetime, on its thread, in `dtype`: kBFloat16 turns LibTorch's autocast on,
/// kFloat changes nothing.
class ComputeScope {
 public:
  explicit ComputeScope(at::ScalarType dtype, at::Device device = at::kCPU);
  ~ComputeScope();
  ComputeScope(const ComputeScope&) = delete;
  ComputeScope& operator=(const ComputeScope&) = delete;

 private:
  at::DeviceType device_;
  bool active_, enabled_before_;
  at::ScalarType dtype_before_;
};

}  // namespace qat::train
