#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

namespace qat::models {

/// Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467):
/// (offset + weight) * x / sqrt(mean(x^2) + eps). Computed in float32 whatever the result's dtype, and
/// rounded once.
class RmsNormImpl : public torch::nn::Cloneable<RmsNormImpl> {
 public:
  /// The gain offset + weight starts at 1.
  RmsNormImpl(int64_t size, double eps, double offset = 0.0);
  void reset() override;
  /// x: float[..., size] -> dtype[..., size].
  at::Tensor forward(const at::Tensor& x, at::ScalarType dtype);

  at::Tensor weight;  ///< float32[size]

 private:
  int64_t size_;
  double eps_, offset_;
};
TORCH_MODULE(RmsNorm);

/// The same with a gain of 1.
at::Tensor plain_rms_norm(const at::Tensor& x, double eps, at::ScalarType dtype);

}  // namespace qat::models
