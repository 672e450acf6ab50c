#pragma once

#include <torch/nn/module.h>

#include "qat/models/config.hpp"
#include "qat/nn/linear.hpp"
#include "rope.hpp"

namespace qat::models {

/// Causal self-attention with grouped key-value heads: head j of H reads key-value head j * K / H.
class AttentionImpl : public torch::nn::Module {
 public:
  explicit AttentionImpl(const DecoderConfig& config);
  /// x: [B, T, h] in the compute dtype -> [B, T, h].
  at::Tensor forward(const at::Tensor& x, const RopeTable& rope);

  /// The two halves of `forward`. x: [B, T, h] -> the heads' values side by side, [B, T, H * D].
  at::Tensor mixed(const at::Tensor& x, const RopeTable& rope);
  /// mixed: [B, T, H * D] -> [B, T, h].
  at::Tensor output(const at::Tensor& mixed) { return o_proj_(mixed); }

 private:
  int64_t head_dim_;
  double scale_;
  nn::Linear q_proj_, k_proj_, v_proj_, o_proj_;
};
TORCH_MODULE(Attention);

}  // namespace qat::models
