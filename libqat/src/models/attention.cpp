#include "attention.hpp"

#include <cmath>

#include "attend.hpp"
#include "fused.hpp"

namespace qat::models {

AttentionImpl::AttentionImpl(const DecoderConfig& config, int64_t layer)
    : layer_(layer),
      config_(config.layer(layer)),
      scale_(config.attention_scale != 0.0 ? config.attention_scale
                                           : 1.0 / std::sqrt(static_cast<double>(config_.head_dim))),
      eps_(config.rms_norm_eps),
      v_norm_(config.v_norm),
      q_proj_(config.hidden_size, config.num_attention_heads * config_.head_dim, config.attention_bias),
      o_proj_(config.num_attention_heads * config_.head_dim, config.hidden_size, config.output_bias) {
  const bool makes_keys = config_.kv_source == layer;
  const int64_t width = config_.num_key_value_heads * config_.head_dim;
  register_module("q_proj", q_proj_);
  if (makes_keys) {
    k_proj_ = register_module("k_proj", nn::Linear(config.hidden_size, width, config.attention_bias));
    if (config_.has_value) {
      v_proj_ = register_module("v_proj", nn::Linear(config.hidden_size, width, config.attention_bias));
    }
  }
  register_module("o_proj", o_proj_);
  if (config.qk_norm) {
    q_norm_ = register_module("q_norm", RmsNorm(config_.head_dim, config.rms_norm_eps, config.norm_offset));
    if (makes_keys) {
      k_norm_ = register_module("k_norm", RmsNorm(config_.head_dim, config.rms_norm_eps, config.norm_offset));
    }
  }
}

at::Tensor AttentionImpl::heads(const at::Tensor& flat, RmsNorm& norm) const {
  const at::Tensor heads = flat.unflatten(-1, {-1, config_.head_dim});
  return norm ? norm(heads, heads.scalar_type()) : heads;
}

KeysValues AttentionImpl::make_keys_values(const at::Tensor& x, const RopeTable& rope) {
  const at::Tensor keys = k_proj_(x);
  at::Tensor values = (v_proj_ ? v_proj_(x) : keys).unflatten(-1, {-1, config_.head_dim});
  if (v_norm_) values = plain_rms_norm(values, eps_, values.scalar_type());
  const auto kept = [](const at::Tensor& made, const std::shared_ptr<ActivationQuantizer>& rounding) {
    return (rounding ? (*rounding)(made) : made).transpose(1, 2);
  };
  return {kept(rotate(heads(keys, k_norm_), rope.cos, rope.sin), key_rounding), kept(values, value_rounding)};
}

at::Tensor AttentionImpl::mixed(const at::Tensor& x, ForwardPass& pass) {
  // The attention kernel takes the transposed view [B, heads, T, D] as it is and answers in the same memory
  // order, so that nothing is copied on the way in or out.
  const RopeTable rope = pass.rope(config_);
  const at::Tensor q = rotate(heads(q_proj_(x), q_norm_), rope.cos, rope.sin).transpose(1, 2);
  const KeysValues read =
      k_proj_ ? pass.add(layer_, make_keys_values(x, rope)) : pass.kept(config_.kv_source);
  const at::Tensor values = attend(q, read.keys, read.values, config_.window, scale_);
  return values.transpose(1, 2).flatten(2);
}

}  // namespace qat::models
