#include "qat/quantizer/quantizer.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/linear.h>

#include <sstream>
#include <utility>

#include "qat/core/error.hpp"
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

Quantizer::Quantizer(std::string tensor, Scheme scheme, Estimator estimator, int64_t row)
    : tensor_(std::move(tensor)), scheme_(std::move(scheme)), estimator_(estimator), row_(row) {
  if (estimator_.scale == ScaleRule::kSeq) ops::check_seq(scheme_.weight, tensor_);
  use_grid("");
}

std::shared_ptr<Quantizer> Quantizer::clone(const std::optional<at::Device>& device) const {
  std::shared_ptr<Quantizer> copy(new Quantizer(*this));
  copy->input_hook_ = copy->output_hook_ = nullptr;
  if (input_) copy->input_ = input_->clone(device);
  if (output_) copy->output_ = output_->clone(device);
  if (!scales_.defined()) return copy;
  const at::NoGradGuard no_grad;
  copy->scales_ = scales_.detach().to(device.value_or(scales_.device()), at::kFloat, false, /*copy=*/true);
  copy->scales_.set_requires_grad(scales_.requires_grad());
  return copy;
}

void Quantizer::add_activations(const Activations& formats, ActivationScales rule, at::Device device) {
  constexpr std::string_view kWeight = ".weight";
  const std::string layer =
      tensor_.ends_with(kWeight) ? tensor_.substr(0, tensor_.size() - kWeight.size()) : tensor_;
  const auto add = [&](const std::string& format, const char* part) {
    return format.empty() ? nullptr
                          : std::make_shared<ActivationQuantizer>(layer + part, format, rule, device);
  };
  input_ = add(formats.input, ".input_activation_scale");
  output_ = add(formats.output, ".output_activation_scale");
}

void Quantizer::use_grid(const std::string& training_grid) {
  training_grid_ = training_grid;
  const int64_t free = estimator_.scale == ScaleRule::kSeq ? ops::seq_params(grid()) : 0;
  tied_ = free > 0;
  params_ = tied_ ? free : ops::scale_params(grid());
}

Estimator Quantizer::rules() const noexcept {
  Estimator rules = estimator_;
  if (is_learned(rules.scale)) rules.scale = ScaleRule::kLearned;
  return rules;
}

at::Tensor Quantizer::field_scales() const {
  return tied_ && scales_.defined() ? ops::seq_tie(scales_, grid(), tensor_) : scales_;
}

at::Tensor Quantizer::matrix(const at::Tensor& latent) const {
  return row_ == 0 || !latent.defined() ? latent : latent.reshape({-1, row_});
}

template <class AsFloat, class Quantized>
at::Tensor Quantizer::blended(const AsFloat& as_float, const Quantized& quantized) const {
  if (!enabled_ || blend_ == 0.0) return as_float();
  return blend_ == 1.0 ? quantized() : at::lerp(as_float(), quantized(), blend_);
}

at::Tensor Quantizer::fake_quantize(const at::Tensor& latent) const {
  return blended(
      [&] { return latent; },
      [&] {
        return ops::fake_quantize(matrix(latent), grid(), rules(), tensor_, field_scales()).view_as(latent);
      });
}

at::Tensor Quantizer::linear_with(const at::Tensor& input, const at::Tensor& latent,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& scales) const {
  if (input_hook_) input_hook_(input);
  const auto quantized = [&] {
    const at::Tensor rounded = input_ ? (*input_)(input) : input;
    const at::Tensor product = ops::quantized_linear(rounded, latent, bias, grid(), rules(), tensor_, scales);
    return output_ ? (*output_)(product) : product;
  };
  at::Tensor output = blended([&] { return float_linear(input, latent, bias); }, quantized);
  if (output_hook_) output_hook_(output);
  return output;
}

at::Tensor Quantizer::linear(const at::Tensor& input, const at::Tensor& latent,
                             const std::optional<at::Tensor>& bias) const {
  return linear_with(input, latent, bias, field_scales());
}

at::Tensor Quantizer::linear_part(const at::Tensor& input, const at::Tensor& latent,
                                  const at::Tensor& scales) const {
  return linear_with(input, latent, {}, scales);
}

at::Tensor Quantizer::embedding(const at::Tensor& indices, const at::Tensor& latent,
                                int64_t padding_idx) const {
  at::Tensor rows = blended([&] { return float_embedding(indices, latent, padding_idx); },
                            [&] {
                              return ops::quantized_embedding(indices, latent, padding_idx, grid(), rules(),
                                                              tensor_, field_scales());
                            });
  if (output_hook_) output_hook_(rows);
  return rows;
}

at::Tensor Quantizer::weight(const at::Tensor& latent, at::ScalarType dtype) const {
  if (!enabled_) return latent.detach().to(dtype);
  return ops::quantized_weight(matrix(latent), dtype, grid(), rules().scale, tensor_, field_scales())
      .view_as(latent);
}

WeightGradients Quantizer::weight_backward(const at::Tensor& grad, const at::Tensor& latent) const {
  if (!enabled_) return {grad, {}};
  if (scales_.defined() && scales_.requires_grad()) {
    auto [by_latent, by_scales] = ops::fake_quantize_backward_scales(
        matrix(grad), matrix(latent), field_scales().detach(), grid(), rules(), tensor_);
    return {by_latent.view_as(latent), tied_ ? ops::seq_tie_backward(by_scales, grid(), tensor_) : by_scales};
  }
  // The identity needs no copy of a large table.
  if (estimator_.kind == EstimatorKind::kSte && estimator_.scale != ScaleRule::kDifferentiated) {
    return {grad, {}};
  }
  const at::Tensor by_latent =
      ops::fake_quantize_backward(matrix(grad), matrix(latent), grid(), rules(), tensor_, field_scales());
  return {by_latent.view_as(latent), {}};
}

std::tuple<at::Tensor, at::Tensor> Quantizer::quantize(const at::Tensor& latent) const {
  return ops::quantize(matrix(latent), grid(), rules().scale, tensor_, field_scales());
}

void Quantizer::set_scales(const at::Tensor& scales) {
  const auto fail = [&](const std::string& expected, const std::string& got) {
    throw ArgumentError("set_scales: " + tensor_ + ": expected " + expected + ", got " + got);
  };
  if (!learned()) {
    fail("a quantizer with learned scales",
         "scale rule " + std::string(to_string(estimator_.scale)) + " on " + grid());
  }
  std::ostringstream wanted, given;
  if (scales_.defined()) {
    wanted << "float32" << scales_.sizes();
  } else {
    wanted << "float32[R, G, " << params_ << "]";
  }
  given << (scales.defined() ? c10::toString(scales.scalar_type()) : "nothing");
  if (scales.defined()) given << scales.sizes();
  const bool fits = scales.defined() && scales.scalar_type() == at::kFloat && scales.dim() == 3 &&
                    scales.size(2) == params_ && (!scales_.defined() || scales.sizes() == scales_.sizes());
  if (!fits) fail(wanted.str(), given.str());
  if (!at::isfinite(scales).all().item<bool>()) fail("finite scales", "NaN or an infinity");
  const at::NoGradGuard no_grad;
  if (scales_.defined()) {
    scales_.copy_(scales);
  } else {
    scales_ = scales.detach().clone(at::MemoryFormat::Contiguous).set_requires_grad(true);
  }
}

void Quantizer::set_field_scales(const at::Tensor& scales) {
  set_scales(tied_ && scales.defined() ? ops::seq_untie(scales, grid(), tensor_) : scales);
}

void Quantizer::initialize_scales(const at::Tensor& latent, ScaleRule from) {
  if (!learned()) return;
  const at::NoGradGuard no_grad;
  const at::Tensor start = tied_ ? ops::seq_start(matrix(latent.detach()), grid(), from, tensor_)
                                 : ops::choose_scales(matrix(latent.detach()), grid(), from, tensor_);
  if (scales_.defined() && scales_.sizes() == start.sizes() && scales_.device() == start.device()) {
    scales_.copy_(start);
  } else {
    const bool trained = !scales_.defined() || scales_.requires_grad();
    scales_ = start.set_requires_grad(trained);
  }
}

void Quantizer::set_blend(double blend) {
  if (!(blend >= 0.0 && blend <= 1.0)) {
    throw ArgumentError("set_blend: " + tensor_ + ": expected a blend in [0, 1], got " +
                        std::to_string(blend));
  }
  blend_ = blend;
}

void Quantizer::set_training_grid(const std::string& name, const at::Tensor& latent) {
  const std::string next = name == scheme_.weight ? "" : name;
  if (next == training_grid_) return;
  Quantizer trial(*this);
  trial.use_grid(next);
  trial.scales_ = at::Tensor();
  if (trial.learned() && !latent.defined()) {
    throw ArgumentError("set_training_grid: " + tensor_ +
                        ": expected the latent, from which learned scales are made anew, got none");
  }
  if (trial.learned()) trial.initialize_scales(latent);
  if (scales_.defined() && trial.scales_.defined()) {
    trial.scales_.set_requires_grad(scales_.requires_grad());
  }
  use_grid(next);
  scales_ = trial.scales_;
}

}  // namespace qat
