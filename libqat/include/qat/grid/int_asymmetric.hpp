#pragma once

// int8_channel_asym ... int2_g256_asym (compressed-tensors, asymmetric): a scale and an integer zero point z
// per block, row or tensor; w_hat = (code - z) * s', codes and zero points -2^(b-1) .. 2^(b-1) - 1. Rule (its
// memoryless min-max observer), with min and max widened to hold 0: s = (max - min) / (2^b - 1), z =
// clamp(-2^(b-1) - min / s), rounded half to even; then s' is s rounded to the scale grid, and the epsilon of
// its type where that is 0; code = clamp(w / s' + z), rounded half to even.
// (compressed_tensors/quantization/utils/helpers.py calculate_qparams with scale_dtype,
// lifecycle/forward.py quantize and dequantize)

#include "qat/grid/rounding.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search_line.hpp"

namespace qat::grid {

struct IntAsymmetric {
  const Info* grid;  ///< outlives the codec; not for device code
  int64_t block;     ///< as in Info
  ScaleGrid scale_grid;
  DType dequant;     ///< type of the product
  float zero_scale;  ///< chosen where the stored scale would be 0
  float max_scale;   ///< with a larger one, the farthest level would not be finite in `dequant`
  float low;         ///< least code and zero point
  float high;        ///< greatest code and zero point

  const Info& info() const { return *grid; }

  /// How far outside the codes a position may lie that counts as inside: half a step, and more than float32
  /// rounds away at a position of 256.
  static constexpr float kHalf = 0.5F + 0x1p-12F;

  /// The rule, from the ends of a block. An all-zero block has the zero point 0.
  QAT_HD void scales_of(float least, float greatest, float* s) const {
    const float from = least < 0.0F ? least : 0.0F;
    const float to = greatest > 0.0F ? greatest : 0.0F;
    const float scale = (to - from) / (high - low);
    const float position = low - from / scale;
    s[0] = round_scale(scale_grid, scale) == 0.0F ? zero_scale : scale;
    s[1] = position == position ? zero_point(position) : 0.0F;
  }

  QAT_HD void choose(const float* w, int64_t n, float* s) const {
    float least = w[0];
    float greatest = w[0];
    for (int64_t i = 1; i < n; ++i) {
      least = w[i] < least ? w[i] : least;
      greatest = w[i] > greatest ? w[i] : greatest;
    }
    scales_of(least, greatest, s);
  }

  /// With s = (to - from) / steps and z = low - from / s, the rounding of z passed straight through. A scale
  /// that is a constant of the rule has no gradient.
  QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) const {
    const EndPlaces ends = places_of_ends(w, n);
    const float from = w[ends.least] < 0.0F ? w[ends.least] : 0.0F;
    const float to = w[ends.greatest] > 0.0F ? w[ends.greatest] : 0.0F;
    const float steps = high - low;
    const float scale = (to - from) / steps;
    if (round_scale(scale_grid, scale) == 0.0F) return;
    const float of_zero = grad_s[1] / scale;                             // dL/d(z s)
    const float widen = (grad_s[0] + of_zero * (from / scale)) / steps;  // dL/d(to - from), for the same from
    if (to > 0.0F) grad_w[ends.greatest] += widen;
    if (from < 0.0F) grad_w[ends.least] -= widen + of_zero;
  }

  QAT_HD void search(const float* w, int64_t n, float* s) const { search_scale_and_offset(*this, w, n, s); }

  /// The scale and the zero point of w_hat = (code - low) * scale + offset.
  QAT_HD void line(float scale, float offset, float* s) const {
    s[0] = scale;
    s[1] = low - offset / scale;
  }

  /// The nearest legal zero point.
  QAT_HD float zero_point(float position) const {
    return static_cast<float>(round_half_even(clamp(position, low, high)));
  }

  QAT_HD Status store(const float* s, float* stored) const {
    stored[0] = round_scale(scale_grid, s[0]);
    stored[1] = zero_point(s[1]);
    if (s[0] != s[0] || s[1] != s[1]) return Status::kNotFinite;
    return magnitude(stored[0]) <= max_scale ? Status::kOk : Status::kOverflow;
  }

  /// Prepared once per block. A learned scale of 0 decodes everything to 0; dividing by infinity picks the
  /// zero point for it.
  struct Encoder {
    float divisor;   ///< the stored scale
    float unstored;  ///< the scale itself: what the range of `in_range` is measured with
    float zero;      ///< the stored zero point
  };

  QAT_HD Encoder encoder(const float* s) const {
    const float stored = round_scale(scale_grid, s[0]);
    const float infinity = float_of(kInfinityBits);
    return {stored == 0.0F ? infinity : stored, s[0] == 0.0F ? infinity : s[0], zero_point(s[1])};
  }

  QAT_HD int encode(float w, const Encoder& e) const {
    return round_half_even(clamp(w / e.divisor + e.zero, low, high));
  }

  QAT_HD float decode(int code, const float* stored) const {
    return round_value(dequant, (static_cast<float>(code) - stored[1]) * stored[0]);
  }

  /// The zero point is rounded, so an end of the rule's own block may lie half a step outside the codes; as
  /// its nearest code is the last one, it counts as inside.
  QAT_HD bool in_range(float w, const Encoder& e) const {
    const float position = w / e.unstored + e.zero;
    return position >= low - kHalf && position <= high + kHalf;
  }
};

}  // namespace qat::grid
