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

 private:
  nn::Linear gate_proj_, up_proj_, down_proj_;
};
TORCH_MODULE(Mlp);

}  // namespace qat::models
