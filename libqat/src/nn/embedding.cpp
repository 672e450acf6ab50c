#include "qat/nn/embedding.hpp"

#include <torch/nn/init.h>

#include "qat/nn/without_initialization.hpp"

namespace qat::nn {

EmbeddingImpl::EmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim)
    : num_embeddings_(num_embeddings), embedding_dim_(embedding_dim) {
  EmbeddingImpl::reset();
}

void EmbeddingImpl::reset() {
  weight = register_parameter("weight", empty_parameter({num_embeddings_, embedding_dim_}));
  if (!WithoutInitialization::active()) torch::nn::init::normal_(weight);
}

std::shared_ptr<torch::nn::Module> EmbeddingImpl::clone(const std::optional<torch::Device>& device) const {
  auto copy = Cloneable::clone(device);
  if (quantizer) std::static_pointer_cast<EmbeddingImpl>(copy)->quantizer = quantizer->clone(device);
  return copy;
}

at::Tensor EmbeddingImpl::forward(const at::Tensor& indices) {
  return quantizer ? quantizer->embedding(indices, weight) : float_embedding(indices, weight);
}

}  // namespace qat::nn
