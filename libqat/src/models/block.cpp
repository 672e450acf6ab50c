#include "block.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>

#include "fused.hpp"

namespace qat::models {
namespace {

RmsNorm norm_of(const DecoderConfig& config) {
  return RmsNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset);
}

/// x + branch, which passes a norm first if there is one.
at::Tensor added(const at::Tensor& x, const at::Tensor& branch, RmsNorm& norm) {
  return x + (norm ? norm(branch, x.scalar_type()) : branch);
}

}  // namespace

BlockImpl::BlockImpl(const DecoderConfig& config, int64_t layer)
    : self_attn(config, layer),
      mlp(config, layer),
      layer_(layer),
      activation_(config.activation),
      input_norm_(norm_of(config)),
      feed_forward_norm_(norm_of(config)) {
  register_module("self_attn", self_attn);
  register_module("mlp", mlp);
  register_module("input_layernorm", input_norm_);
  if (config.branch_norms) {
    attention_output_norm_ = register_module("post_attention_layernorm", norm_of(config));
    register_module("pre_feedforward_layernorm", feed_forward_norm_);
    feed_forward_output_norm_ = register_module("post_feedforward_layernorm", norm_of(config));
  } else {
    register_module("post_attention_layernorm", feed_forward_norm_);
  }
  if (config.experts.count > 0) experts_.emplace(config, *this);
  if (const int64_t size = config.per_layer_input.size; size > 0) {
    layer_input_gate_ = register_module("per_layer_input_gate", nn::Linear(config.hidden_size, size, false));
    layer_input_projection_ =
        register_module("per_layer_projection", nn::Linear(size, config.hidden_size, false));
    layer_input_norm_ = register_module("post_per_layer_input_norm", norm_of(config));
  }
  if (config.layer_scalar) layer_scalar_ = register_buffer("layer_scalar", at::ones({1}));
}

at::Tensor BlockImpl::forward(at::Tensor x, ForwardPass& pass) {
  x = add_attention(x, self_attn->mixed(attention_input(x, pass), pass));
  x = add_feed_forward(x, mlp->gated(feed_forward_input(x, pass)), pass);
  if (layer_input_gate_) x = add_layer_input(x, gated_layer_input(x, pass));
  return leave(x);
}

at::Tensor BlockImpl::attention_input(const at::Tensor& x, const ForwardPass& pass) {
  return input_norm_(x, pass.compute());
}

at::Tensor BlockImpl::add_attention(const at::Tensor& x, const at::Tensor& mixed) {
  return added(x, self_attn->output(mixed), attention_output_norm_);
}

at::Tensor BlockImpl::feed_forward_input(const at::Tensor& x, const ForwardPass& pass) {
  return feed_forward_norm_(x, pass.compute());
}

at::Tensor BlockImpl::add_feed_forward(const at::Tensor& x, const at::Tensor& gated,
                                       const ForwardPass& pass) {
  const at::Tensor dense = mlp->output(gated);
  if (!experts_) return add_branch(x, dense);
  const RoutedTokens routed = experts_->route(x, pass.compute());
  return add_branch(x, experts_->join(routed, experts_->gated(routed), dense));
}

at::Tensor BlockImpl::add_branch(const at::Tensor& x, const at::Tensor& branch) {
  return added(x, branch, feed_forward_output_norm_);
}

at::Tensor BlockImpl::gated_layer_input(const at::Tensor& x, const ForwardPass& pass) {
  const at::Tensor& own = pass.layer_inputs[static_cast<size_t>(layer_)];
  return gated(layer_input_gate_(x.to(pass.compute())), own, activation_);
}

at::Tensor BlockImpl::add_layer_input(const at::Tensor& x, const at::Tensor& gated) {
  return added(x, layer_input_projection_(gated), layer_input_norm_);
}

at::Tensor BlockImpl::leave(const at::Tensor& x) {
  return layer_scalar_.defined() ? x * layer_scalar_ : x;
}

}  // namespace qat::models
