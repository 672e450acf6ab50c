#pragma once

#include <torch/nn/module.h>

#include <vector>

#include "block.hpp"
#include "qat/nn/embedding.hpp"
#include "qat/nn/linear.hpp"

namespace qat::models {

/// "model" of Hugging Face's names: everything but the head.
class TrunkImpl : public torch::nn::Module {
 public:
  explicit TrunkImpl(const DecoderConfig& config);

  /// A pass of tokens [B, T] (or anything [B, T, ...] made of them), behind what `cache` holds if there is
  /// one.
  ForwardPass begin(const at::Tensor& tokens, KvCache* cache = nullptr) const;

  /// tokens: int64[B, T] -> the residual stream in front of the first layer, float32[B, T, h].
  /// ArgumentError for another shape or dtype and for ids outside the vocabulary.
  at::Tensor embed(const at::Tensor& tokens);
  /// Of a model with inputs per layer, from the residual stream x that `embed` gave: what
  /// per_layer_model_projection is multiplied with, and the inputs from its product and the tokens.
  at::Tensor layer_inputs_input(const at::Tensor& x, const ForwardPass& pass) const;
  /// tokens: int64[B, T] -> the tokens' part, float32[B, T, L * p].
  at::Tensor token_inputs(const at::Tensor& tokens);
  /// input: of `layer_inputs_input`; token_inputs: [B, T, L * p] -> one [B, T, p] in the compute dtype for
  /// each of L layers.
  std::vector<at::Tensor> layer_inputs(const at::Tensor& input, const at::Tensor& token_inputs);
  bool has_layer_inputs() const { return config_.per_layer_input.size > 0; }
  /// The dtype in which matrix products run: autocast's, or that of the weights.
  at::ScalarType compute_dtype() const;

  nn::Embedding embed_tokens;
  std::vector<Block> layers;
  RmsNorm norm;

 private:
  DecoderConfig config_;
  // Of a model with inputs per layer.
  nn::Embedding layer_table_{nullptr};
  nn::Linear layer_projection_{nullptr};
  RmsNorm layer_norm_{nullptr};
};
TORCH_MODULE(Trunk);

}  // namespace qat::models
