#pragma once

#include <torch/nn/module.h>

#include "qat/models/config.hpp"
#include "qat/nn/linear.hpp"

namespace qat::models {

/// The gated feed-forward layer: down(f(gate(x)) * up(x)). (Shazeer 2020, arXiv:2002.05202)
class MlpImpl : public torch::nn::Module {
 public:
  MlpImpl(const DecoderConfig& config, int64_t layer);

  /// x: [B, T, h] in the compute dtype -> f(gate(x)) * up(x), [B, T, I].
  at::Tensor gated(const at::Tensor& x);
  /// gated: [B, T, I] -> [B, T, h].
  at::Tensor output(const at::Tensor& gated) { return down_proj_(gated); }

 private:
  Activation activation_;
  nn::Linear gate_proj_, up_proj_, down_proj_;
};
TORCH_MODULE(Mlp);

}  // namespace qat::models
