#include "qat/quantizer/quantizer.hpp"

#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>

#include <utility>

#include "qat/ops/ops.hpp"

namespace qat {

at::Tensor float_linear(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias) {
  const at::ScalarType dtype = input.scalar_type();
  return at::linear(input, weight.to(dtype), bias ? std::optional(bias->to(dtype)) : std::nullopt);
}

at::Tensor float_embedding(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx) {
  return at::embedding(weight, indices, padding_idx);
}

Quantizer::Quantizer(std::string tensor, Scheme scheme, Estimator estimator)
    : tensor_(std::move(tensor)), scheme_(std::move(scheme)), estimator_(estimator) {
  ops::check_grid(scheme_.weight);
}

at::Tensor Quantizer::fake_quantize(const at::Tensor& latent) const {
  return enabled_ ? ops::fake_quantize(latent, scheme_.weight, estimator_, tensor_) : latent;
}

at::Tensor Quantizer::linear(const at::Tensor& input, const at::Tensor& latent,
                             const std::optional<at::Tensor>& bias) const {
  if (!enabled_) return float_linear(input, latent, bias);
  return ops::quantized_linear(input, latent, bias, scheme_.weight, estimator_, tensor_);
}

at::Tensor Quantizer::embedding(const at::Tensor& indices, const at::Tensor& latent,
                                int64_t padding_idx) const {
  if (!enabled_) return float_embedding(indices, latent, padding_idx);
  return ops::quantized_embedding(indices, latent, padding_idx, scheme_.weight, estimator_, tensor_);
}

at::Tensor Quantizer::weight(const at::Tensor& latent, at::ScalarType dtype) const {
  return enabled_ ? ops::quantized_weight(latent, dtype, scheme_.weight, estimator_.scale, tensor_)
                  : latent.detach().to(dtype);
}

at::Tensor Quantizer::weight_backward(const at::Tensor& grad, const at::Tensor& latent) const {
  // The identity needs no copy of a large table.
  if (!enabled_ || estimator_.kind == EstimatorKind::kSte) return grad;
  return ops::fake_quantize_backward(grad, latent, scheme_.weight, estimator_, tensor_);
}

}  // namespace qat
