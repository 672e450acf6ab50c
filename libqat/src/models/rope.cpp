#include "rope.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/tensor.h>

namespace qat::models {

RopeTable make_rope(int64_t start, int64_t tokens, int64_t head_dim, const arch::Rope& rope,
                    at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  // In float32 and in this order of operations, so that unscaled frequencies are transformers' bit for bit.
  const at::Tensor exponent = at::arange(0, head_dim, 2, options) / head_dim;
  at::Tensor frequency = at::pow(at::Scalar(rope.theta), exponent).reciprocal();
  if (rope.type != arch::RopeType::kDefault) {
    frequency = frequency / at::tensor(arch::rope_divisors(rope, head_dim), options);
  }
  const at::Tensor angle = at::outer(at::arange(start, start + tokens, options), frequency);
  if (rope.attention_factor == 1.0) return {angle.cos(), angle.sin()};
  return {angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor};
}

}  // namespace qat::models
