#include "qat/models/decoder.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <string>
#include <utility>
#include <vector>

#include "qat/core/error.hpp"
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
  return hidden_of(tokens, nullptr);
}

at::Tensor Decoder::hidden_of(const at::Tensor& tokens, KvCache* cache) {
  Trunk& model = parts_->model;
  at::Tensor x = model->embed(tokens);
  ForwardPass pass = model->begin(tokens, cache);
  if (model->has_layer_inputs()) {
    pass.layer_inputs = model->layer_inputs(model->layer_inputs_input(x, pass), model->token_inputs(tokens));
  }
  for (Block& layer : model->layers) x = layer(x, pass);
  return model->norm(x, pass.compute());
}

at::Tensor Decoder::forward(const at::Tensor& tokens, KvCache& cache) {
  const at::NoGradGuard no_grad;
  if (tokens.dim() == 2 && cache.batch() != 0 && cache.batch() != tokens.size(0)) {
    throw ArgumentError("Decoder: tokens: expected the " + std::to_string(cache.batch()) +
                        " sequences that the cache holds, got " + std::to_string(tokens.size(0)));
  }
  const at::Tensor logits = head(hidden_of(tokens, &cache));
  cache.commit(tokens.size(0), tokens.size(1));
  return logits;
}

at::Tensor Decoder::head(const at::Tensor& hidden) {
  return output_head().logits(hidden);
}

Head Decoder::output_head() const {
  const double softcap = config_.final_logit_softcapping;
  if (parts_->lm_head) return {parts_->lm_head->weight, {}, parts_->lm_head->quantizer, softcap};
  const nn::Embedding& embedding = parts_->model->embed_tokens;
  return {embedding->weight, {}, embedding->quantizer, softcap};
}

at::Tensor Decoder::forward(const at::Tensor& tokens) {
  return head(hidden(tokens));
}

std::vector<Stage> Decoder::stages() const {
  return make_stages(parts_->model, config_);
}

std::vector<nn::KvSlot> Decoder::kv_slots() {
  const auto name = [](int64_t layer) { return "model.layers." + std::to_string(layer) + ".self_attn"; };
  std::vector<nn::KvSlot> slots;
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    if (config_.layer(i).kv_source != i) continue;
    AttentionImpl* const attention = &*parts_->model->layers[static_cast<size_t>(i)]->self_attn;
    slots.push_back(
        {name(i),
         {},
         [attention](std::shared_ptr<ActivationQuantizer> keys, std::shared_ptr<ActivationQuantizer> values) {
           attention->key_rounding = std::move(keys);
           attention->value_rounding = std::move(values);
         }});
    for (int64_t reader = i + 1; reader < config_.num_hidden_layers; ++reader) {
      if (config_.layer(reader).kv_source == i) slots.back().aliases.push_back(name(reader));
    }
  }
  return slots;
}

std::shared_ptr<Decoder> Decoder::frozen_copy(at::ScalarType dtype) {
  const nn::WithoutInitialization to_be_copied;
  auto copy = std::make_shared<Decoder>(config_);
  const auto sources = named_parameters();
  for (auto& item : copy->named_parameters()) {
    const at::Tensor& source = sources[item.key()];
    // A matrix has two dimensions, a norm's gain one. A router's choice is not continuous.
    const bool rounded = source.dim() > 1 && item.key().find(".router.") == std::string::npos;
    item.value().set_data(source.detach().to(rounded ? dtype : at::kFloat, false, /*copy=*/true));
    item.value().set_requires_grad(false);
  }
  const auto buffers = named_buffers();
  for (auto& item : copy->named_buffers()) item.value().copy_(buffers[item.key()]);
  copy->eval();
  return copy;
}

}  // namespace qat::models
