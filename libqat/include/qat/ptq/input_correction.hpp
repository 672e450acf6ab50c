#pragma once

// A layer behind rounded ones gets other inputs x than the float model's x*. Its own weights can make up for
// a part of that before they are rounded:
//
//     W + share * W E[(x* - x) x^T] (H + damping)^-1,   H = E[x x^T]
//
// At share 1 the outputs come closest to W x* on the calibration text, but a large part of that fits its
// noise. (Li et al. 2025, GPTAQ, arXiv:2504.02692, corrects column by column on the way)

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

namespace qat::ptq {

/// How far a layer's inputs are from the float model's. Memory: N^2 float32.
class InputDrift {
 public:
  /// width: N, the layer's in_features.
  explicit InputDrift(int64_t width);

  /// reference, input: [..., N], the same vectors x* and x of the float and of the rounded model; weights as
  /// for InputMoments. Products are formed in the dtype of `input`: bfloat16's rounding, of half a per cent
  /// in each, is far below the noise of a calibration text. ArgumentError for another width or different
  /// shapes.
  void add(const at::Tensor& reference, const at::Tensor& input, const at::Tensor& weights = {});

  /// E[(x* - x) x^T], float64[N, N]; zeros before the first `add`.
  at::Tensor mean() const;

 private:
  int64_t count_ = 0;
  at::Tensor sum_;
};

/// share * E[(x* - x) x^T] (H + damping)^-1, float32[N, N] on the CPU: what rows are multiplied by. hessian,
/// drift: float32 or float64[N, N]; damping as in GptqOptions. ArgumentError for other shapes and dtypes and
/// for a share outside 0 .. 1; NumericError for values that are not finite and for a hessian that is not
/// positive definite with that damping. `tensor` is the weight's name in messages.
at::Tensor input_correction(const at::Tensor& hessian, const at::Tensor& drift, double share, double damping,
                            std::string_view tensor = "");

}  // namespace qat::ptq
