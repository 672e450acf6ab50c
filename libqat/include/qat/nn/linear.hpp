#pragma once

// Thin modules over the operators. Without a quantizer they are the ordinary float layers; `prepare` binds
// one. The weight member is always the latent.

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <optional>

#include "qat/quantizer/quantizer.hpp"

namespace qat::nn {

/// y = x @ W^T + b, W: float32[out_features, in_features]. When the input is bfloat16 the float weight is
/// cast.
class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features, bool bias = true);
  void reset() override;
  at::Tensor forward(const at::Tensor& input);

  at::Tensor weight;  ///< float32[out_features, in_features], the latent
  at::Tensor bias;    ///< float32[out_features], or undefined
  std::shared_ptr<Quantizer> quantizer;

 private:
  int64_t in_features_, out_features_;
  bool has_bias_;
};
TORCH_MODULE(Linear);

/// y[t] = W[indices[t]], W: float32[num_embeddings, embedding_dim].
class EmbeddingImpl : public torch::nn::Cloneable<EmbeddingImpl> {
 public:
  EmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim);
  void reset() override;
  at::Tensor forward(const at::Tensor& indices);

  at::Tensor weight;  ///< float32[num_embeddings, embedding_dim], the latent
  std::shared_ptr<Quantizer> quantizer;

 private:
  int64_t num_embeddings_, embedding_dim_;
};
TORCH_MODULE(Embedding);

}  // namespace qat::nn
