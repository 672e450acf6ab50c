#pragma once

#include <torch/nn/module.h>

#include "qat/models/config.hpp"
#include "qat/nn/linear.hpp"

namespace qat::models {

/// The gated feed-forward layer: down(silu(gate(x)) * up(x)). (Shazeer 2020, arXiv:2002.05202)
class MlpImpl : public torch::nn::Module {
 public:
  explicit MlpImpl(const DecoderConfig& config);
  /// x: [B, T, h] in the compute dtype -> [B, T, h].
  at::Tensor forward(const at::Tensor& x);

  /// The two halves of `forward`. x: [B, T, h] -> silu(gate(x)) * up(x), [B, T, I].
  at::Tensor gated(const at::Tensor& x);
  /// gated: [B, T, I] -> [B, T, h].
  at::Tensor output(const at::Tensor& gated) { return down_proj_(gated); }

 private:
  nn::Linear gate_proj_, up_proj_, down_proj_;
};
TORCH_MODULE(Mlp);

}  // namespace qat::models
