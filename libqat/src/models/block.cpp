#include "block.hpp"

#include <ATen/TensorOperators.h>

namespace qat::models {

BlockImpl::BlockImpl(const DecoderConfig& config)
    : self_attn_(config),
      mlp_(config),
      input_layernorm_(config.hidden_size, config.rms_norm_eps),
      post_attention_layernorm_(config.hidden_size, config.rms_norm_eps) {
  register_module("self_attn", self_attn_);
  register_module("mlp", mlp_);
  register_module("input_layernorm", input_layernorm_);
  register_module("post_attention_layernorm", post_attention_layernorm_);
}

at::Tensor BlockImpl::forward(const at::Tensor& x, const RopeTable& rope, at::ScalarType compute) {
  const at::Tensor attended = x + self_attn_(input_layernorm_(x, compute), rope);
  return attended + mlp_(post_attention_layernorm_(attended, compute));
}

}  // namespace qat::models
