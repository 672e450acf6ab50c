#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace qat::train {

/// The arithmetic of forward and backward, while latents and moments stay float32.
class ComputeScope {
 public:
  /// dtype: kFloat changes nothing, kBFloat16 turns LibTorch's autocast on for the object's life.
  ComputeScope(at::Device device, at::ScalarType dtype);
  ~ComputeScope();
  ComputeScope(const ComputeScope&) = delete;
  ComputeScope& operator=(const ComputeScope&) = delete;

 private:
  at::DeviceType device_;
  bool active_, enabled_before_;
  at::ScalarType dtype_before_;
};

/// "float32" and "bfloat16" as they are; "auto" becomes "bfloat16" on an accelerator and on a CPU that
/// multiplies it (AVX512-BF16 or AMX), else "float32".
std::string resolve_compute_dtype(const std::string& name, at::Device device);

}  // namespace qat::train
