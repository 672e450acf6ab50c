#include "trunk.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/nn/modules/container/modulelist.h>

#include <cmath>
#include <numbers>
#include <sstream>
#include <string>

#include "qat/core/error.hpp"

namespace qat::models {
namespace {

void check_tokens(const at::Tensor& tokens, int64_t vocabulary) {
  if (tokens.dim() != 2 || tokens.scalar_type() != at::kLong) {
    std::ostringstream got;
    got << tokens.scalar_type() << tokens.sizes();
    throw ArgumentError("Decoder: tokens: expected int64[B, T], got " + got.str());
  }
  if (tokens.numel() == 0) throw ArgumentError("Decoder: tokens: expected at least one token, got none");
  const auto [least, greatest] = at::aminmax(tokens);
  const int64_t low = least.item<int64_t>(), high = greatest.item<int64_t>();
  if (low < 0 || high >= vocabulary) {
    throw ArgumentError("Decoder: tokens: expected ids in [0, " + std::to_string(vocabulary) + "), got " +
                        std::to_string(low < 0 ? low : high));
  }
}

/// Rows of a table times a factor that is rounded to the table's dtype, in float32 (or float64): the residual
/// stream keeps the low bits of its sums even when the products are bfloat16.
at::Tensor scaled(nn::Embedding& table, const at::Tensor& tokens, double scale) {
  const at::Tensor rows = table(tokens);
  const at::Tensor x = rows.to(at::promote_types(rows.scalar_type(), at::kFloat));
  if (scale == 1.0) return x;
  return x * at::scalar_tensor(scale, table->weight.options().requires_grad(false)).to(x.scalar_type());
}

}  // namespace

TrunkImpl::TrunkImpl(const DecoderConfig& config)
    : embed_tokens(config.vocab_size, config.hidden_size),
      norm(config.hidden_size, config.rms_norm_eps, config.norm_offset),
      config_(config) {
  register_module("embed_tokens", embed_tokens);
  torch::nn::ModuleList list;
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    layers.emplace_back(config, i);
    list->push_back(layers.back());
  }
  register_module("layers", list);
  register_module("norm", norm);
  if (!has_layer_inputs()) return;
  const int64_t size = config.per_layer_input.size, all = size * config.num_hidden_layers;
  layer_table_ =
      register_module("embed_tokens_per_layer", nn::Embedding(config.per_layer_input.vocab_size, all));
  layer_projection_ =
      register_module("per_layer_model_projection", nn::Linear(config.hidden_size, all, /*bias=*/false));
  layer_norm_ =
      register_module("per_layer_projection_norm", RmsNorm(size, config.rms_norm_eps, config.norm_offset));
}

ForwardPass TrunkImpl::begin(const at::Tensor& tokens, KvCache* cache) const {
  return {config_, tokens.size(1), tokens.device(), compute_dtype(), cache};
}

at::Tensor TrunkImpl::embed(const at::Tensor& tokens) {
  check_tokens(tokens, embed_tokens->weight.size(0));
  return scaled(embed_tokens, tokens, config_.embedding_scale);
}

at::Tensor TrunkImpl::layer_inputs_input(const at::Tensor& x, const ForwardPass& pass) const {
  return x.to(pass.compute());
}

at::Tensor TrunkImpl::token_inputs(const at::Tensor& tokens) {
  check_tokens(tokens, layer_table_->weight.size(0));
  return scaled(layer_table_, tokens, std::sqrt(static_cast<double>(config_.per_layer_input.size)));
}

std::vector<at::Tensor> TrunkImpl::layer_inputs(const at::Tensor& input, const at::Tensor& token_inputs) {
  const auto by_layer = [this](const at::Tensor& all) {
    return all.unflatten(-1, {config_.num_hidden_layers, config_.per_layer_input.size});
  };
  const at::Tensor product = layer_projection_(input).to(token_inputs.scalar_type());
  const at::Tensor context = product * (1.0 / std::sqrt(static_cast<double>(config_.hidden_size)));
  const at::Tensor both = layer_norm_(by_layer(context), context.scalar_type()) + by_layer(token_inputs);
  // Rounded here, where it is one tensor: layers use them in no other dtype.
  return (both * std::numbers::sqrt2 * 0.5).to(input.scalar_type()).unbind(2);
}

at::ScalarType TrunkImpl::compute_dtype() const {
  const at::Tensor& weight = embed_tokens->weight;
  const at::DeviceType device = weight.device().type();
  return at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device)
                                                   : weight.scalar_type();
}

}  // namespace qat::models
