#pragma once

// What one weight carries through training: where it ships (Scheme), how its gradient flows (Estimator), and
// its name for messages. Stateless while every scale is dynamic; learned scales will live here as parameters.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "qat/core/scheme.hpp"

namespace qat {

/// The layers of a weight that stays float. Weight and bias are cast to input's dtype. Shapes as in
/// ops::quantized_linear and ops::quantized_embedding.
at::Tensor float_linear(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias);
/// See `float_linear`.
at::Tensor float_embedding(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx = -1);

/// The link between one weight and its grid. Holds no tensor; the latent is passed to each call.
class Quantizer {
 public:
  /// `tensor`: the weight's parameter name. Throws ArgumentError for an unknown grid.
  Quantizer(std::string tensor, Scheme scheme, Estimator estimator);

  /// float32[R, ...] latent -> float32 on the grid; see ops::fake_quantize. Returns the latent when disabled.
  at::Tensor fake_quantize(const at::Tensor& latent) const;
  /// See ops::quantized_linear; float_linear when disabled.
  at::Tensor linear(const at::Tensor& input, const at::Tensor& latent,
                    const std::optional<at::Tensor>& bias) const;
  /// See ops::quantized_embedding; float_embedding when disabled.
  at::Tensor embedding(const at::Tensor& indices, const at::Tensor& latent, int64_t padding_idx = -1) const;

  /// The numbers that `linear` multiplies with: w_hat (the latent when disabled) rounded once to `dtype`.
  /// Carries no gradient.
  at::Tensor weight(const at::Tensor& latent, at::ScalarType dtype) const;
  /// dL/dlatent from dL/dweight; see ops::fake_quantize_backward. The gradient itself when disabled.
  at::Tensor weight_backward(const at::Tensor& grad, const at::Tensor& latent) const;

  const std::string& tensor() const noexcept { return tensor_; }
  const Scheme& scheme() const noexcept { return scheme_; }
  const Estimator& estimator() const noexcept { return estimator_; }

  /// A disabled quantizer passes latents through: the float model, without unpreparing it.
  bool enabled() const noexcept { return enabled_; }
  /// See `enabled`.
  void set_enabled(bool enabled) noexcept { enabled_ = enabled; }

 private:
  std::string tensor_;
  Scheme scheme_;
  Estimator estimator_;
  bool enabled_ = true;
};

}  // namespace qat
