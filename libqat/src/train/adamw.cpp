#include "train/adamw.hpp"

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <optional>
#include <utility>

namespace qat::train {

AdamW::AdamW(std::vector<at::Tensor> parameters, const Options& options)
    : parameters_(std::move(parameters)),
      begun_(parameters_.size(), 0),
      beta1_(options.beta1),
      beta2_(options.beta2),
      epsilon_(options.epsilon),
      weight_decay_(options.weight_decay),
      clip_norm_(options.clip_norm) {
  const c10::NoGradGuard no_grad;
  for (const at::Tensor& parameter : parameters_) {
    first_.push_back(at::zeros_like(parameter));
    second_.push_back(at::zeros_like(parameter));
  }
}

double AdamW::gradient_norm() const {
  const c10::NoGradGuard no_grad;
  double squares = 0;
  for (const at::Tensor& parameter : parameters_) {
    if (!parameter.grad().defined()) continue;
    const double norm = at::linalg_vector_norm(parameter.grad()).item<double>();
    squares += norm * norm;
  }
  return std::sqrt(squares);
}

void AdamW::update(int64_t step, double learning_rate, double gradient_norm) {
  const c10::NoGradGuard no_grad;
  std::vector<at::Tensor> parameters, gradients, first, second, steps;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (!parameters_[i].grad().defined()) continue;
    parameters.push_back(parameters_[i]);
    gradients.push_back(parameters_[i].grad());
    first.push_back(first_[i]);
    second.push_back(second_[i]);
    const at::TensorOptions f32 = at::TensorOptions(at::kFloat).device(parameters.back().device());
    steps.push_back(at::full({}, static_cast<double>(step - begun_[i]), f32));
  }
  if (parameters.empty()) return;
  // The kernel divides gradients by this scale (it is meant for loss scaling).
  std::optional<at::Tensor> scale;
  if (clip_norm_ > 0 && gradient_norm > clip_norm_) {
    scale = at::full({}, gradient_norm / clip_norm_, steps[0].options());
  }
  at::_fused_adamw_(parameters, gradients, first, second, {}, steps, learning_rate, beta1_, beta2_,
                    weight_decay_, epsilon_, /*amsgrad=*/false, /*maximize=*/false, scale);
}

void AdamW::clear_gradients() {
  for (at::Tensor& parameter : parameters_) parameter.mutable_grad() = at::Tensor();
}

}  // namespace qat::train
