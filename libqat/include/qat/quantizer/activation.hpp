#pragma once

// What rounds the activations of one place in a model: the input or the output of a layer, or the keys or
// values that attention keeps.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "qat/core/activation.hpp"

namespace qat {

/// dL/dx and dL/dscale of `scale()`, which is undefined unless it requires a gradient.
struct ActivationGradients {
  at::Tensor input;
  at::Tensor scale;
};

/// Activations as the consumer rounds them. The scale of int8_tensor_static grows to max|x| / 127 while it
/// calibrates: in the first forward passes that record a gradient, as many as `rule.batches`, and in all that
/// run while `set_calibrating` is on. A pass that activation checkpointing repeats inside backward is not
/// counted again. Afterwards the scale stays, or trains. Until the first batch it is 0: nothing is rounded.
class ActivationQuantizer {
 public:
  /// `name`: of the scale in checkpoints, "model.layers.0.mlp.up_proj.input_activation_scale". `device`: that
  /// of the activations. ArgumentError for an unknown format.
  ActivationQuantizer(std::string name, std::string format, ActivationScales rule, at::Device device);

  /// A deep copy, its scale on `device` if one is given.
  std::shared_ptr<ActivationQuantizer> clone(const std::optional<at::Device>& device = std::nullopt) const;

  /// x_hat, differentiable; see ops::fake_quantize_activation. x: float[..., I]. NumericError naming the
  /// scale for NaN and infinities while it calibrates.
  at::Tensor operator()(const at::Tensor& x);

  /// A call in steps, for who never holds all of x at a time. First: whether a call would calibrate now.
  bool calibrates() const;
  /// Then, only when `calibrates()`: widens the scale to max|x| / 127 and counts a batch. Largest magnitudes
  /// of the parts will do for x. ArgumentError when there is no scale, NumericError as above.
  void observe(const at::Tensor& x);
  /// Then, of whole tokens of x: x_hat by the scale as it is, in x's dtype, also under autocast; x itself
  /// when disabled. Carries no gradient and does not calibrate.
  at::Tensor values(const at::Tensor& x) const;
  /// Last: from dL/dx_hat, like `x` and for the same scale. The gradient itself when disabled.
  ActivationGradients backward(const at::Tensor& grad, const at::Tensor& x) const;

  const std::string& name() const noexcept { return name_; }
  const std::string& format() const noexcept { return format_; }
  /// Whether there is a scale: the format is int8_tensor_static.
  bool has_scale() const noexcept { return scale_.defined(); }
  /// Whether it trains after calibration.
  bool learned() const noexcept { return has_scale() && rule_.rule == ActivationRule::kLearned; }
  /// float32[1, 1, 1], always the same tensor; a leaf that requires a gradient when learned, unless the
  /// caller says otherwise. Undefined without a scale.
  const at::Tensor& scale() const noexcept { return scale_; }
  /// int64[1] on the CPU, always the same tensor: the batches that calibration has seen.
  const at::Tensor& batches() const noexcept { return batches_; }

  /// A disabled one passes activations through and does not calibrate.
  void set_enabled(bool enabled) noexcept { enabled_ = enabled; }
  /// See `set_enabled`.
  bool enabled() const noexcept { return enabled_; }
  /// Sets the scale and ends calibration. ArgumentError for NaN and infinities.
  void set_scale(double scale);
  /// On: every pass calibrates. Off (at first): only the first `rule.batches` that record gradients do.
  void set_calibrating(bool calibrating) noexcept { calibrating_ = calibrating; }

 private:
  ActivationQuantizer(const ActivationQuantizer&) = default;
  std::optional<at::Tensor> detached_scale() const;

  std::string name_, format_;
  ActivationScales rule_;
  at::Tensor scale_, batches_;
  bool calibrating_ = false, enabled_ = true;
};

}  // namespace qat
