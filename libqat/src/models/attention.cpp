#include "attention.hpp"

#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>

#include "fused.hpp"

namespace qat::models {
AttentionImpl::AttentionImpl(const DecoderConfig& config)
    : head_dim_(config.head_dim),
      scale_(1.0 / std::sqrt(static_cast<double>(config.head_dim))),
      q_proj_(config.hidden_size, config.num_attention_heads * config.head_dim, config.attention_bias),
      k_proj_(config.hidden_size, config.num_key_value_heads * config.head_dim, config.attention_bias),
      v_proj_(config.hidden_size, config.num_key_value_heads * config.head_dim, config.attention_bias),
      o_proj_(config.num_attention_heads * config.head_dim, config.hidden_size, config.output_bias) {
  register_module("q_proj", q_proj_);
  register_module("k_proj", k_proj_);
  register_module("v_proj", v_proj_);
  register_module("o_proj", o_proj_);
}

at::Tensor AttentionImpl::forward(const at::Tensor& x, const RopeTable& rope) {
  return output(mixed(x, rope));
}

at::Tensor AttentionImpl::mixed(const at::Tensor& x, const RopeTable& rope) {
  // [B, T, heads * D] -> [B, T, heads, D]; the attention kernel takes the transposed view as it is and
  // answers in the same memory order, so that nothing is copied on the way in or out.
  const auto heads = [&](const at::Tensor& flat) { return flat.unflatten(-1, {-1, head_dim_}); };
  const at::Tensor q = rotate(heads(q_proj_(x)), rope.cos, rope.sin).transpose(1, 2);
  const at::Tensor k = rotate(heads(k_proj_(x)), rope.cos, rope.sin).transpose(1, 2);
  const at::Tensor v = heads(v_proj_(x)).transpose(1, 2);
  const at::Tensor values = at::scaled_dot_product_attention(q, k, v, /*attn_mask=*/{}, /*dropout_p=*/0.0,
                                                             /*is_causal=*/true, scale_,
                                                             /*enable_gqa=*/q.size(1) != k.size(1));
  return values.transpose(1, 2).flatten(2);
}

}  // namespace qat::models
