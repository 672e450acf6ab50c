#include "qat/nn/experts.hpp"

#include <torch/nn/init.h>

#include <cmath>

#include "qat/nn/without_initialization.hpp"

namespace qat::nn {

LinearStack::LinearStack(const at::Tensor& weights, std::shared_ptr<Quantizer> quantizer)
    // One view of each, so that their gradients are put together once.
    : weights_(weights.unbind(0)), quantizer_(std::move(quantizer)) {
  if (!quantizer_ || !quantizer_->scales().defined()) return;
  const at::Tensor scales = quantizer_->field_scales();
  scales_ = scales.unflatten(0, {weights.size(0), weights.size(1)}).unbind(0);
}

at::Tensor LinearStack::linear(int64_t i, const at::Tensor& input) const {
  const auto part = static_cast<size_t>(i);
  if (!quantizer_) return float_linear(input, weights_[part], {});
  return quantizer_->linear_part(input, weights_[part], scales_.empty() ? at::Tensor() : scales_[part]);
}

ExpertsImpl::ExpertsImpl(int64_t experts, int64_t hidden_size, int64_t intermediate_size)
    : experts_(experts), hidden_size_(hidden_size), intermediate_size_(intermediate_size) {
  ExpertsImpl::reset();
}

void ExpertsImpl::reset() {
  gate_up_proj =
      register_parameter("gate_up_proj", empty_parameter({experts_, 2 * intermediate_size_, hidden_size_}));
  down_proj = register_parameter("down_proj", empty_parameter({experts_, hidden_size_, intermediate_size_}));
  if (WithoutInitialization::active()) return;
  for (const at::Tensor& stack : {gate_up_proj, down_proj}) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(stack.size(2)));
    torch::nn::init::uniform_(stack, -bound, bound);
  }
}

std::shared_ptr<torch::nn::Module> ExpertsImpl::clone(const std::optional<torch::Device>& device) const {
  auto copy = Cloneable::clone(device);
  const auto experts = std::static_pointer_cast<ExpertsImpl>(copy);
  if (gate_up_quantizer) experts->gate_up_quantizer = gate_up_quantizer->clone(device);
  if (down_quantizer) experts->down_quantizer = down_quantizer->clone(device);
  return copy;
}

}  // namespace qat::nn
