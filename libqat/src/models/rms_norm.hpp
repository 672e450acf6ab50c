#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

namespace qat::models {

/// Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467):
/// weight * x / sqrt(mean(x^2) + eps). Computed in float32 whatever the result's dtype.
class RmsNormImpl : public torch::nn::Cloneable<RmsNormImpl> {
 public:
  RmsNormImpl(int64_t size, double eps);
  void reset() override;
  /// x: float32[..., size] -> dtype[..., size].
  at::Tensor forward(const at::Tensor& x, at::ScalarType dtype);

  at::Tensor weight;  ///< float32[size], the gain

 private:
  int64_t size_;
  double eps_;
};
TORCH_MODULE(RmsNorm);

}  // namespace qat::models
