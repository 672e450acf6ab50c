#include "trunk.hpp"

#include <ATen/autocast_mode.h>
#include <ATen/ops/aminmax.h>
#include <torch/nn/modules/container/modulelist.h>

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

}  // namespace

TrunkImpl::TrunkImpl(const DecoderConfig& config)
    : embed_tokens(config.vocab_size, config.hidden_size), norm(config.hidden_size, config.rms_norm_eps) {
  register_module("embed_tokens", embed_tokens);
  torch::nn::ModuleList list;
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    layers.emplace_back(config);
    list->push_back(layers.back());
  }
  register_module("layers", list);
  register_module("norm", norm);
}

at::Tensor TrunkImpl::embed(const at::Tensor& tokens) {
  check_tokens(tokens, embed_tokens->weight.size(0));
  const at::Tensor x = embed_tokens(tokens);
  // The residual stream is float32 even when the products are bfloat16: sums over layers keep their low bits.
  return x.to(at::promote_types(x.scalar_type(), at::kFloat));
}

at::ScalarType TrunkImpl::compute_dtype() const {
  const at::Tensor& weight = embed_tokens->weight;
  const at::DeviceType device = weight.device().type();
  return at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device)
                                                   : weight.scalar_type();
}

}  // namespace qat::models
