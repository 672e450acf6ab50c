#include "expert_branch.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cmath>
#include <vector>

#include "fused.hpp"

namespace qat::models {
namespace {

/// layer(expert, its rows) for every expert that has rows, one below the other.
template <class Layer>
at::Tensor by_expert(const at::Tensor& rows, const at::Tensor& counts, const Layer& layer) {
  std::vector<at::Tensor> outputs;
  for (int64_t expert = 0, first = 0; expert < counts.size(0); ++expert) {
    const int64_t count = counts.const_data_ptr<int64_t>()[expert];
    if (count > 0) outputs.push_back(layer(expert, rows.narrow(0, first, count)));
    first += count;
  }
  return at::cat(outputs);
}

}  // namespace

RouterImpl::RouterImpl(const DecoderConfig& config)
    : per_token_(config.experts.per_token),
      eps_(config.rms_norm_eps),
      proj_(config.hidden_size, config.experts.count, /*bias=*/false) {
  register_module("proj", proj_);
  scale_ = register_parameter("scale", at::ones({config.hidden_size}));
  per_expert_scale_ = register_parameter("per_expert_scale", at::ones({config.experts.count}));
}

RouterImpl::Choice RouterImpl::forward(const at::Tensor& x) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const double shrink = 1.0 / std::sqrt(static_cast<double>(x.size(-1)));
  const at::Tensor scores = proj_(plain_rms_norm(x, eps_, x.scalar_type()) * scale_ * shrink);
  const auto [weights, experts] = at::topk(at::softmax(scores, -1), per_token_, -1);
  return {experts, weights / weights.sum(-1, true) *
                       per_expert_scale_.index_select(0, experts.flatten()).view_as(weights)};
}

ExpertBranch::ExpertBranch(const DecoderConfig& config, torch::nn::Module& block)
    : activation_(config.activation),
      router_(config),
      experts_(config.experts.count, config.hidden_size, config.experts.intermediate_size),
      input_norm_(config.hidden_size, config.rms_norm_eps, config.norm_offset),
      output_norm_(config.hidden_size, config.rms_norm_eps, config.norm_offset),
      dense_output_norm_(config.hidden_size, config.rms_norm_eps, config.norm_offset) {
  block.register_module("router", router_);
  block.register_module("experts", experts_);
  block.register_module("post_feedforward_layernorm_1", dense_output_norm_);
  block.register_module("post_feedforward_layernorm_2", output_norm_);
  block.register_module("pre_feedforward_layernorm_2", input_norm_);
}

RoutedTokens ExpertBranch::route(const at::Tensor& x, at::ScalarType compute) {
  const at::Tensor tokens = x.flatten(0, -2), input = input_norm_(tokens, compute);
  const RouterImpl::Choice choice = router_(tokens);
  const int64_t per_token = choice.experts.size(1);
  const at::Tensor chosen = choice.experts.flatten();
  const at::Tensor order = at::argsort(chosen, /*stable=*/true, -1, false);
  const at::Tensor each = input.unsqueeze(1).expand({-1, per_token, -1}).flatten(0, 1);
  const at::Tensor counts = at::bincount(chosen, {}, experts_->gate_up_proj.size(0)).cpu();
  return {each.index_select(0, order), counts, at::argsort(order, int64_t{-1}), choice.weights};
}

at::Tensor ExpertBranch::gated(const RoutedTokens& tokens) const {
  const nn::LinearStack gate_up = experts_->gate_up();
  return by_expert(tokens.rows, tokens.counts, [&](int64_t expert, const at::Tensor& rows) {
    const auto halves = gate_up.linear(expert, rows).chunk(2, -1);
    return models::gated(halves[0], halves[1], activation_);
  });
}

at::Tensor ExpertBranch::join(const RoutedTokens& tokens, const at::Tensor& gated, const at::Tensor& dense) {
  const nn::LinearStack down = experts_->down();
  const at::Tensor outputs = by_expert(gated, tokens.counts, [&](int64_t expert, const at::Tensor& rows) {
    return down.linear(expert, rows);
  });
  const at::Tensor& weights = tokens.weights;
  const at::Tensor each = outputs.index_select(0, tokens.places).unflatten(0, weights.sizes());
  const at::Tensor sum = (each * weights.unsqueeze(-1)).sum(1).view_as(dense);
  const at::ScalarType wide = weights.scalar_type();
  return dense_output_norm_(dense, wide) + output_norm_(sum, wide);
}

}  // namespace qat::models
