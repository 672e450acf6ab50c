#include "qat/quantizer/activation.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "qat/core/error.hpp"
#include "qat/ops/activation.hpp"

namespace qat {
namespace {

/// Checkpointing runs a layer's forward a second time, inside the backward pass.
bool recomputing() {
  return torch::autograd::get_current_graph_task_id() != -1;
}

}  // namespace

ActivationQuantizer::ActivationQuantizer(std::string name, std::string format, ActivationScales rule,
                                         at::Device device)
    : name_(std::move(name)), format_(std::move(format)), rule_(rule) {
  check_activation_format(format_);
  if (format_ != kInt8TensorStatic) return;
  scale_ = at::zeros({1, 1, 1}, at::TensorOptions(at::kFloat).device(device));
  scale_.set_requires_grad(learned());
  batches_ = at::zeros({1}, at::kLong);
}

std::shared_ptr<ActivationQuantizer> ActivationQuantizer::clone(
    const std::optional<at::Device>& device) const {
  std::shared_ptr<ActivationQuantizer> copy(new ActivationQuantizer(*this));
  if (!has_scale()) return copy;
  const at::NoGradGuard no_grad;
  copy->scale_ = scale_.detach().to(device.value_or(scale_.device()), at::kFloat, false, /*copy=*/true);
  copy->scale_.set_requires_grad(scale_.requires_grad());
  copy->batches_ = batches_.clone();
  return copy;
}

bool ActivationQuantizer::calibrates() const {
  if (!enabled_ || !has_scale() || recomputing()) return false;
  return calibrating_ || (at::GradMode::is_enabled() && batches_.item<int64_t>() < rule_.batches);
}

void ActivationQuantizer::observe(const at::Tensor& x) {
  if (!has_scale()) {
    throw ArgumentError("observe: " + name_ +
                        ": expected a quantizer with a scale, int8_tensor_static, got " + format_);
  }
  const at::NoGradGuard no_grad;
  const double seen = x.numel() == 0 ? 0.0 : x.detach().abs().max().item<double>();
  if (!std::isfinite(seen)) {
    throw NumericError("calibration: " + name_ + ": expected finite activations, got NaN or an infinity");
  }
  scale_.fill_(std::max(scale_.item<float>(), static_cast<float>(seen / 127.0)));
  batches_.add_(1);
}

at::Tensor ActivationQuantizer::operator()(const at::Tensor& x) {
  if (!enabled_) return x;
  if (!has_scale()) return ops::fake_quantize_activation(x, format_, std::nullopt, name_);
  const bool calibrating = calibrates();
  if (calibrating) observe(x);
  // A later pass widens it, perhaps before this one's backward.
  const at::Tensor scale = calibrating ? scale_.detach().clone() : scale_;
  return ops::fake_quantize_activation(x, format_, scale.squeeze(), name_);
}

std::optional<at::Tensor> ActivationQuantizer::detached_scale() const {
  return has_scale() ? std::optional(scale_.detach().squeeze()) : std::nullopt;
}

at::Tensor ActivationQuantizer::values(const at::Tensor& x) const {
  if (!enabled_) return x;
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return ops::fake_quantize_activation(x, format_, detached_scale(), name_);
}

ActivationGradients ActivationQuantizer::backward(const at::Tensor& grad, const at::Tensor& x) const {
  if (!enabled_ || !has_scale()) return {grad, {}};
  const at::NoGradGuard no_grad;
  const at::Tensor scale = *detached_scale();
  if (!scale_.requires_grad()) return {ops::fake_quantize_activation_backward(grad, x, scale, name_), {}};
  auto [by_input, by_scale] = ops::fake_quantize_activation_backward_scale(grad, x, scale, name_);
  return {std::move(by_input), by_scale.view_as(scale_)};
}

void ActivationQuantizer::set_scale(double scale) {
  if (!has_scale() || !std::isfinite(static_cast<float>(scale))) {
    throw ArgumentError("set_scale: " + name_ + ": expected a finite scale for int8_tensor_static, got " +
                        std::to_string(scale) + " for " + format_);
  }
  const at::NoGradGuard no_grad;
  scale_.fill_(scale);
  batches_.fill_(std::max(batches_.item<int64_t>(), rule_.batches));
}

}  // namespace qat
