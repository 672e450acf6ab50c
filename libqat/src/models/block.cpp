#include "block.hpp"

#include <ATen/TensorOperators.h>

namespace qat::models {

BlockImpl::BlockImpl(const DecoderConfig& config)
    : self_attn(config),
      mlp(config),
      input_layernorm(config.hidden_size, config.rms_norm_eps),
      post_attention_layernorm(config.hidden_size, config.rms_norm_eps) {
  register_module("self_attn", self_attn);
  register_module("mlp", mlp);
  register_module("input_layernorm", input_layernorm);
  register_module("post_attention_layernorm", post_attention_layernorm);
}

at::Tensor BlockImpl::forward(const at::Tensor& x, const RopeTable& rope, at::ScalarType compute) {
  const at::Tensor attended = x + self_attn(input_layernorm(x, compute), rope);
  return attended + mlp(post_attention_layernorm(attended, compute));
}

}  // namespace qat::models
