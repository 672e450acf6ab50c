#include "train/scale_steps.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <utility>

namespace qat::train {
namespace {

std::vector<at::Tensor> zeros_of(const std::vector<TrainedScale>& scales) {
  const c10::NoGradGuard no_grad;
  std::vector<at::Tensor> zeros;
  for (const TrainedScale& scale : scales) zeros.push_back(at::zeros_like(scale.value));
  return zeros;
}

Options without_decay(Options options) {
  options.weight_decay = 0;
  return options;
}

}  // namespace

at::Tensor field_means(const at::Tensor& scales, const std::vector<int>& sizes) {
  const at::Tensor each = scales.detach().abs().mean({0, 1});
  at::Tensor means = at::empty(each.sizes(), each.options());
  int64_t first = 0;
  for (const int size : sizes) {
    means.slice(0, first, first + size).copy_(each.slice(0, first, first + size).mean());
    first += size;
  }
  return means;
}

ScaleSteps::ScaleSteps(std::vector<TrainedScale> scales, const Options& options, int64_t after)
    : scales_(std::move(scales)), moves_(zeros_of(scales_)), adam_(moves_, without_decay(options)) {
  const c10::NoGradGuard no_grad;
  for (std::size_t i = 0; i < scales_.size(); ++i) {
    units_.push_back(field_means(scales_[i].value, scales_[i].sizes));
    adam_.begin_after(i, after);
  }
}

double ScaleSteps::gradient_norm() const {
  const c10::NoGradGuard no_grad;
  double squares = 0;
  for (const TrainedScale& scale : scales_) {
    if (!scale.value.grad().defined()) continue;
    squares += scale.value.grad().square().sum(at::kDouble).item<double>();
  }
  return std::sqrt(squares);
}

void ScaleSteps::update(int64_t step, double rate, double gradient_norm) {
  const c10::NoGradGuard no_grad;
  for (std::size_t i = 0; i < scales_.size(); ++i) {
    moves_[i].zero_();
    moves_[i].mutable_grad() = scales_[i].value.grad();
  }
  adam_.update(step, rate, gradient_norm);
  for (std::size_t i = 0; i < scales_.size(); ++i) {
    if (!moves_[i].grad().defined()) continue;
    // Those of activations are 0 until calibration has seen a batch.
    if (!units_[i].any().item<bool>()) units_[i].copy_(field_means(scales_[i].value, scales_[i].sizes));
    at::Tensor(scales_[i].value).add_(moves_[i] * units_[i]);
  }
  adam_.clear_gradients();
}

void ScaleSteps::clear_gradients() {
  for (TrainedScale& scale : scales_) scale.value.mutable_grad() = at::Tensor();
}

void ScaleSteps::add_state(std::vector<StateTensor>& tensors) const {
  for (std::size_t i = 0; i < scales_.size(); ++i) {
    tensors.push_back({"exp_avg/" + scales_[i].name, adam_.first_moments()[i]});
    tensors.push_back({"exp_avg_sq/" + scales_[i].name, adam_.second_moments()[i]});
    tensors.push_back({"scale_unit/" + scales_[i].name, units_[i]});
  }
}

}  // namespace qat::train
