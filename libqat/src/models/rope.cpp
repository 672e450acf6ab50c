#include "rope.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>

namespace qat::models {

Rope make_rope(int64_t tokens, int64_t head_dim, double theta, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  // In float32 and in this order of operations, so that the frequencies are transformers' bit for bit.
  const at::Tensor exponent = at::arange(0, head_dim, 2, options) / head_dim;
  const at::Tensor frequency = at::pow(at::Scalar(theta), exponent).reciprocal();
  const at::Tensor angle = at::outer(at::arange(0, tokens, options), frequency);
  return {angle.cos(), angle.sin()};
}

}  // namespace qat::models
