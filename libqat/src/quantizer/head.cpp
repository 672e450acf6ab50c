#include "qat/quantizer/head.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/tanh.h>

#include <optional>

namespace qat {

at::Tensor Head::logits(const at::Tensor& hidden) const {
  const std::optional<at::Tensor> addend = bias.defined() ? std::optional(bias) : std::nullopt;
  const at::Tensor plain =
      quantizer ? quantizer->linear(hidden, weight, addend) : float_linear(hidden, weight, addend);
  return softcap == 0.0 ? plain : at::tanh(plain / softcap) * softcap;
}

at::Tensor Head::shipped_weight(at::ScalarType dtype) const {
  return quantizer ? quantizer->weight(weight, dtype) : weight.detach().to(dtype);
}

}  // namespace qat
