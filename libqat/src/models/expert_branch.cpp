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

at::Tensor ExpertBranch::join(const at::Tensor& x, const at::Tensor& dense, at::ScalarType compute) {
  const at::Tensor tokens = x.flatten(0, -2);
  const at::Tensor sum = mixed(input_norm_(tokens, compute), router_(tokens)).view_as(x);
  return dense_output_norm_(dense, x.scalar_type()) + output_norm_(sum, x.scalar_type());
}

at::Tensor ExpertBranch::mixed(const at::Tensor& x, const RouterImpl::Choice& choice) const {
  const int64_t tokens = x.size(0), per_token = choice.experts.size(1), width = x.size(1);
  // Each token stands here once for each of its experts, sorted by expert; `back` undoes the sorting.
  const at::Tensor chosen = choice.experts.flatten();
  const at::Tensor order = at::argsort(chosen, /*stable=*/true, -1, false),
                   back = at::argsort(order, int64_t{-1});
  const at::Tensor rows =
      x.unsqueeze(1).expand({tokens, per_token, width}).flatten(0, 1).index_select(0, order);
  const nn::LinearStack gate_up = experts_->gate_up(), down = experts_->down();
  const at::Tensor counts = at::bincount(chosen).cpu();
  std::vector<at::Tensor> outputs;
  for (int64_t expert = 0, first = 0; expert < counts.size(0); ++expert) {
    const int64_t count = counts.const_data_ptr<int64_t>()[expert];
    if (count == 0) continue;
    const auto halves = gate_up.linear(expert, rows.narrow(0, first, count)).chunk(2, -1);
    outputs.push_back(down.linear(expert, gated(halves[0], halves[1], activation_)));
    first += count;
  }
  const at::Tensor each = at::cat(outputs).index_select(0, back).view({tokens, per_token, width});
  return (each * choice.weights.unsqueeze(-1)).sum(1);
}

}  // namespace qat::models
