#pragma once

#include <ATen/core/Tensor.h>

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

}  // namespace qat::train
