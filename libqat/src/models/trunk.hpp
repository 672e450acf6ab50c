#pragma once

#include <torch/nn/module.h>

#include <vector>

#include "block.hpp"
#include "qat/nn/embedding.hpp"

namespace qat::models {

/// "model" of Hugging Face's names: everything but the head.
class TrunkImpl : public torch::nn::Module {
 public:
  explicit TrunkImpl(const DecoderConfig& config);

  /// tokens: int64[B, T] -> the residual stream in front of the first layer, float32[B, T, h].
  /// ArgumentError for another shape or dtype and for ids outside the vocabulary.
  at::Tensor embed(const at::Tensor& tokens);
  /// The dtype in which matrix products run: autocast's, or that of the weights.
  at::ScalarType compute_dtype() const;

  nn::Embedding embed_tokens;
  std::vector<Block> layers;
  RmsNorm norm;
};
TORCH_MODULE(Trunk);

}  // namespace qat::models
