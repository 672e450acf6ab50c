#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <memory>

#include "qat/quantizer/quantizer.hpp"

namespace qat::nn {

/// y[t] = W[indices[t]], W: float32[num_embeddings, embedding_dim]. Without a quantizer it is the ordinary
/// float layer; `prepare` binds one.
class EmbeddingImpl : public torch::nn::Cloneable<EmbeddingImpl> {
 public:
  EmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim);

  /// Draws a new weight from N(0, 1), as torch::nn::Embedding does; but see WithoutInitialization.
  void reset() override;
  /// A deep copy; its quantizer is a copy too, so that disabling one layer's leaves the other's alone.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  /// indices: int64[...] -> float32[..., embedding_dim].
  at::Tensor forward(const at::Tensor& indices);

  at::Tensor weight;  ///< float32[num_embeddings, embedding_dim], the latent
  std::shared_ptr<Quantizer> quantizer;

 private:
  int64_t num_embeddings_, embedding_dim_;
};
TORCH_MODULE(Embedding);

}  // namespace qat::nn
