#include "qat/models/decoder.hpp"

#include <ATen/TensorOperators.h>

#include <vector>

#include "qat/nn/linear.hpp"
#include "qat/nn/without_initialization.hpp"
#include "stages.hpp"
#include "trunk.hpp"

namespace qat::models {

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
  Trunk& model = parts_->model;
  at::Tensor x = model->embed(tokens);
  const at::ScalarType compute = model->compute_dtype();
  const RopeTable rope = make_rope(tokens.size(1), config_.head_dim, config_.rope, tokens.device());
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

std::vector<Stage> Decoder::stages() const {
  return make_stages(parts_->model, config_);
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
