#pragma once

// What one weight carries through training: where it ships (Scheme), how its gradient flows (Estimator), its
// learned scales if it has any, and its name for messages.

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "qat/core/scheme.hpp"
#include "qat/quantizer/activation.hpp"

namespace qat {

/// The layers of a weight that stays float. Weight and bias are cast to input's dtype. Shapes as in
/// ops::quantized_linear and ops::quantized_embedding.
at::Tensor float_linear(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias);
/// See `float_linear`.
at::Tensor float_embedding(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx = -1);

/// dL/dlatent and dL/dscales of Quantizer::scales(); `scales` is undefined unless they are learned and
/// require a gradient.
struct WeightGradients {
  at::Tensor latent;
  at::Tensor scales;
};

/// The link between one weight and its grid. The latent is passed to each call; learned scales live here.
class Quantizer {
 public:
  /// `tensor`: the weight's parameter name. `row`: see `row()`. Throws ArgumentError for an unknown grid, and
  /// for the scale rule kSeq on a grid that cannot hold SEQ.
  Quantizer(std::string tensor, Scheme scheme, Estimator estimator, int64_t row = 0);
  Quantizer& operator=(const Quantizer&) = delete;

  /// Rounds what goes into `linear` and what comes out from now on. Static scales are named after the layer:
  /// "<layer>.input_activation_scale", "<layer>.output_activation_scale". `device`: that of the activations.
  void add_activations(const Activations& formats, ActivationScales rule, at::Device device);
  /// Of what goes into `linear`; null where it is not rounded. `embedding` rounds nothing.
  const std::shared_ptr<ActivationQuantizer>& input() const noexcept { return input_; }
  /// Of what comes out.
  const std::shared_ptr<ActivationQuantizer>& output() const noexcept { return output_; }

  /// A deep copy, its scales on `device` if one is given; without the hooks.
  std::shared_ptr<Quantizer> clone(const std::optional<at::Device>& device = std::nullopt) const;

  /// float32[R, ...] latent -> float32 on the grid; see ops::fake_quantize. Returns the latent when disabled.
  at::Tensor fake_quantize(const at::Tensor& latent) const;
  /// See ops::quantized_linear; float_linear when disabled.
  at::Tensor linear(const at::Tensor& input, const at::Tensor& latent,
                    const std::optional<at::Tensor>& bias) const;
  /// `linear` for some of the rows: `latent` holds them, `scales` their part of field_scales() (undefined
  /// where that is). Grids with one scale for the whole tensor do not come in parts.
  at::Tensor linear_part(const at::Tensor& input, const at::Tensor& latent, const at::Tensor& scales) const;
  /// See ops::quantized_embedding; float_embedding when disabled.
  at::Tensor embedding(const at::Tensor& indices, const at::Tensor& latent, int64_t padding_idx = -1) const;

  /// The numbers that `linear` multiplies with when the blend is 1: w_hat (the latent when disabled) rounded
  /// once to `dtype`. Carries no gradient.
  at::Tensor weight(const at::Tensor& latent, at::ScalarType dtype) const;
  /// From dL/dweight; see ops::fake_quantize_backward and _backward_scales. The gradient itself when
  /// disabled.
  WeightGradients weight_backward(const at::Tensor& grad, const at::Tensor& latent) const;
  /// Codes and stored scales of the grid that forward uses; see ops::quantize. Also when disabled.
  std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& latent) const;

  const std::string& tensor() const noexcept { return tensor_; }
  /// Weights in a row of the matrix that the grid sees; 0: everything after dimension 0. Latents then come as
  /// they are, [E, O, I] say, and count as [E * O, I].
  int64_t row() const noexcept { return row_; }
  /// The latent as the grid sees it: a view [R, row], or the latent.
  at::Tensor matrix(const at::Tensor& latent) const;
  const Scheme& scheme() const noexcept { return scheme_; }
  const Estimator& estimator() const noexcept { return estimator_; }

  /// A disabled quantizer passes latents through: the float model, without unpreparing it.
  bool enabled() const noexcept { return enabled_; }
  /// See `enabled`.
  void set_enabled(bool enabled) noexcept { enabled_ = enabled; }

  /// Whether the scales are parameters: the rule is kLearned or kSeq and the grid in use has scales.
  bool learned() const noexcept { return is_learned(estimator_.scale) && params_ > 0; }
  /// Whether they are the free parameters of SEQ: the rule is kSeq and the grid in use holds SEQ. On a
  /// training grid that does not, scales are learned without a tie.
  bool tied() const noexcept { return tied_; }
  /// The parameters: float32[R, G, P], unstored ([1, 1, P] where the whole tensor shares them), or float32[R,
  /// G, F] where tied. A leaf that requires a gradient unless the caller says otherwise. Undefined unless
  /// learned and initialised.
  const at::Tensor& scales() const noexcept { return scales_; }
  /// The scales that the operators take with the rule kLearned, float32[R, G, P]: scales(), or what they
  /// give where tied, differentiable. Undefined as scales() is.
  at::Tensor field_scales() const;
  /// Sets the parameters whose field_scales() are `scales`, float32[R, G, P]: see set_scales, and
  /// ArgumentError for scales that the tie cannot give.
  void set_field_scales(const at::Tensor& scales);
  /// Copies into scales() (which stay the same tensor) when there are any, and adopts `scales` otherwise.
  /// ArgumentError naming the tensor when scales are not learned, for a wrong shape or dtype, and for NaN and
  /// infinities.
  void set_scales(const at::Tensor& scales);
  /// Sets the scales that a rule gives to the latent: any but kLearned and kSeq, see ops::choose_scales;
  /// where tied kReference or kSearch, see ops::seq_start. Does nothing unless learned.
  void initialize_scales(const at::Tensor& latent, ScaleRule from = ScaleRule::kSearch);

  /// b: forward computes (1 - b) * (the float layer) + b * (the quantized layer). 1 at first. `weight`,
  /// reports and freezing ignore it.
  double blend() const noexcept { return blend_; }
  /// ArgumentError outside [0, 1].
  void set_blend(double blend);

  /// The grid that forward uses in place of the scheme's, which ships: for training at more bits first. "" is
  /// the scheme's. Freezing and reports do not see it.
  const std::string& training_grid() const noexcept { return training_grid_; }
  /// Learned scales are made anew, as another tensor, from `latent` by kSearch: they must then be given to
  /// the optimizer again. ArgumentError for an unknown grid, and for learned scales without a latent;
  /// NumericError for a latent that is not finite.
  void set_training_grid(const std::string& grid, const at::Tensor& latent = {});

  /// Called by `linear`, enabled or not, with the layer's input [..., I] before the product; null is none.
  void set_input_hook(std::function<void(const at::Tensor& input)> hook) { input_hook_ = std::move(hook); }
  /// The same with the layer's output [..., O], after the product; by `embedding` with the rows looked up.
  void set_output_hook(std::function<void(const at::Tensor& output)> hook) { output_hook_ = std::move(hook); }

 private:
  Quantizer(const Quantizer&) = default;

  const std::string& grid() const noexcept {
    return training_grid_.empty() ? scheme_.weight : training_grid_;
  }
  void use_grid(const std::string& training_grid);
  /// The estimator as operators take it.
  Estimator rules() const noexcept;
  at::Tensor linear_with(const at::Tensor& input, const at::Tensor& latent,
                         const std::optional<at::Tensor>& bias, const at::Tensor& scales) const;
  template <class AsFloat, class Quantized>
  at::Tensor blended(const AsFloat& as_float, const Quantized& quantized) const;

  std::string tensor_;
  Scheme scheme_;
  Estimator estimator_;
  int64_t row_ = 0;
  bool enabled_ = true;
  int64_t params_ = 0;  ///< P of the grid in use, F where tied
  bool tied_ = false;
  at::Tensor scales_;
  double blend_ = 1.0;
  std::string training_grid_;
  std::shared_ptr<ActivationQuantizer> input_, output_;
  std::function<void(const at::Tensor&)> input_hook_, output_hook_;
};

}  // namespace qat
