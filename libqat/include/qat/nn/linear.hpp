#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <memory>

#include "qat/quantizer/quantizer.hpp"

namespace qat::nn {

/// y = x @ W^T + b, W: float32[out_features, in_features]. Without a quantizer it is the ordinary float
/// layer, except that the weight is cast to the input's dtype; `prepare` binds one.
class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features, bool bias = true);

  /// Draws new parameters from U(-1/sqrt(in_features), 1/sqrt(in_features)), as torch::nn::Linear does;
  /// but see WithoutInitialization.
  void reset() override;
  /// A deep copy; its quantizer is a copy too, so that disabling one layer's leaves the other's alone.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  /// input: [..., in_features] of float32, bfloat16 or float16 -> [..., out_features] of the same dtype.
  at::Tensor forward(const at::Tensor& input);

  at::Tensor weight;  ///< float32[out_features, in_features], the latent
  at::Tensor bias;    ///< float32[out_features], or undefined
  std::shared_ptr<Quantizer> quantizer;

 private:
  int64_t in_features_, out_features_;
  bool has_bias_;
};
TORCH_MODULE(Linear);

}  // namespace qat::nn
