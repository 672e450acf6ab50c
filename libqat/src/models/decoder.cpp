#include "qat/models/decoder.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/aminmax.h>
#include <torch/nn/modules/container/modulelist.h>

#include <sstream>
#include <vector>

#include "block.hpp"
#include "qat/core/error.hpp"
#include "qat/nn/embedding.hpp"
#include "qat/nn/without_initialization.hpp"

namespace qat::models {
namespace {

/// "model" of Hugging Face's names: everything but the head.
class TrunkImpl : public torch::nn::Module {
 public:
  explicit TrunkImpl(const DecoderConfig& config)
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

  nn::Embedding embed_tokens;
  std::vector<Block> layers;
  RmsNorm norm;
};
TORCH_MODULE(Trunk);

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

/// The dtype in which matrix products run.
at::ScalarType compute_dtype(const at::Tensor& weight) {
  const at::DeviceType device = weight.device().type();
  return at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device)
                                                   : weight.scalar_type();
}

}  // namespace

struct Decoder::Parts {
  explicit Parts(const DecoderConfig& config) : model(config) {
    if (!config.tie_word_embeddings)
      lm_head = nn::Linear(config.hidden_size, config.vocab_size, /*bias=*/false);
  }

  Trunk model;
  nn::Linear lm_head{nullptr};  ///< empty when tied
};

Decoder::Decoder(const DecoderConfig& config) : config_(config) {
  validate(config);
  parts_ = std::make_unique<Parts>(config);
  register_module("model", parts_->model);
  if (parts_->lm_head) register_module("lm_head", parts_->lm_head);
}

Decoder::~Decoder() = default;

at::Tensor Decoder::hidden(const at::Tensor& tokens) {
  check_tokens(tokens, config_.vocab_size);
  Trunk& model = parts_->model;
  const at::ScalarType compute = compute_dtype(model->embed_tokens->weight);
  const RopeTable rope = make_rope(tokens.size(1), config_.head_dim, config_.rope, tokens.device());
  at::Tensor x = model->embed_tokens(tokens);
  // The residual stream is float32 even when the products are bfloat16: sums over layers keep their low bits.
  x = x.to(at::promote_types(x.scalar_type(), at::kFloat));
  for (Block& layer : model->layers) x = layer(x, rope, compute);
  return model->norm(x, compute);
}

at::Tensor Decoder::head(const at::Tensor& hidden) {
  return output_head().logits(hidden);
}

Head Decoder::output_head() const {
  if (parts_->lm_head) return {parts_->lm_head->weight, {}, parts_->lm_head->quantizer};
  const nn::Embedding& embedding = parts_->model->embed_tokens;
  return {embedding->weight, {}, embedding->quantizer};
}

at::Tensor Decoder::forward(const at::Tensor& tokens) {
  return head(hidden(tokens));
}

std::shared_ptr<Decoder> Decoder::frozen_copy(at::ScalarType dtype) {
  const nn::WithoutInitialization to_be_copied;
  auto copy = std::make_shared<Decoder>(config_);
  const auto sources = named_parameters();
  for (auto& item : copy->named_parameters()) {
    const at::Tensor& source = sources[item.key()];
    // A matrix has two dimensions, a norm's gain one.
    item.value().set_data(source.detach().to(source.dim() > 1 ? dtype : at::kFloat, false, /*copy=*/true));
    item.value().set_requires_grad(false);
  }
  copy->eval();
  return copy;
}

}  // namespace qat::models
