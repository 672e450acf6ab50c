#include "qat/nn/linear.hpp"

#include <torch/nn/init.h>

#include <cmath>

#include "qat/nn/without_initialization.hpp"

namespace qat::nn {

LinearImpl::LinearImpl(int64_t in_features, int64_t out_features, bool with_bias)
    : in_features_(in_features), out_features_(out_features), has_bias_(with_bias) {
  LinearImpl::reset();
}

void LinearImpl::reset() {
  weight = register_parameter("weight", empty_parameter({out_features_, in_features_}));
  bias = register_parameter("bias", has_bias_ ? empty_parameter({out_features_}) : at::Tensor(), has_bias_);
  if (WithoutInitialization::active()) return;
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (has_bias_) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(in_features_));
    torch::nn::init::uniform_(bias, -bound, bound);
  }
}

std::shared_ptr<torch::nn::Module> LinearImpl::clone(const std::optional<torch::Device>& device) const {
  auto copy = Cloneable::clone(device);
  if (quantizer) std::static_pointer_cast<LinearImpl>(copy)->quantizer = quantizer->clone(device);
  return copy;
}

at::Tensor LinearImpl::forward(const at::Tensor& input) {
  const std::optional<at::Tensor> addend = bias.defined() ? std::optional(bias) : std::nullopt;
  return quantizer ? quantizer->linear(input, weight, addend) : float_linear(input, weight, addend);
}

}  // namespace qat::nn
