#pragma once

#include <torch/nn/module.h>

#include "attention.hpp"
#include "mlp.hpp"
#include "rms_norm.hpp"

namespace qat::models {

/// One layer: x + attention(norm(x)), then x + mlp(norm(x)).
class BlockImpl : public torch::nn::Module {
 public:
  explicit BlockImpl(const DecoderConfig& config);
  /// x: the residual stream, float32[B, T, h] -> the same. The branches run in `compute`.
  at::Tensor forward(const at::Tensor& x, const RopeTable& rope, at::ScalarType compute);

  Attention self_attn;
  Mlp mlp;
  RmsNorm input_layernorm, post_attention_layernorm;
};
TORCH_MODULE(Block);

}  // namespace qat::models
