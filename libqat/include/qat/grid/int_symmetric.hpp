#pragma once

// Symmetric integers: one scale per block, row or tensor; w_hat = code * s', codes -2^(b-1) .. 2^(b-1) - 1.
// Rule: s = max|w| / divisor; code = clamp(w / s), rounded half to even. Options: s' is s rounded to a scale
// grid, and codes are then picked with s'; the product is rounded to the consumer's compute type. Two rules
// differ in their constants:
//
// - compressed-tensors (int4_g32, ...): divisor (2^b - 1) / 2, and where s' would be 0 the epsilon of its
//   type. (compressed_tensors/quantization/utils/helpers.py calculate_qparams with scale_dtype,
//   lifecycle/forward.py quantize and dequantize)
// - Gemma mobile (mobile4, ...): divisor 2^(b-1) - 1, with max|w| at least 1e-9, and 2^-14 where s' would
//   still be 0: kernels demand a positive, normal scale. Codes of 8 bits are picked from -127 on, though a
//   file may hold -128. (ai_edge_quantizer uniform_quantize_tensor.py tensor_zp_scale_from_min_max,
//   uniform_quantize)

#include "qat/grid/rounding.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

struct IntSymmetric {
  const Info* grid;  ///< outlives the codec; not for device code
  int64_t block;     ///< as in Info
  ScaleGrid scale_grid;
  DType dequant;     ///< type of the product
  float divisor;     ///< largest magnitude -> scale
  float least;       ///< smaller largest magnitudes count as this
  float zero_scale;  ///< chosen where the stored scale would be 0
  float max_scale;   ///< with a larger one, the lowest level would not be finite in `dequant`
  float low;         ///< least code that `encode` picks
  float high;        ///< greatest code that `encode` picks
  bool negative;     ///< consumers read a negative scale

  const Info& info() const { return *grid; }

  QAT_HD float scale_of(float largest) const {
    const float scale = (largest > least ? largest : least) / divisor;
    return round_scale(scale_grid, scale) == 0.0F ? zero_scale : scale;
  }

  QAT_HD void choose(const float* w, int64_t n, float* s) const { s[0] = scale_of(absolute_maximum(w, n)); }

  /// A scale that is a constant of the rule has no gradient.
  QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) const {
    const float largest = absolute_maximum(w, n);
    if (largest <= least || round_scale(scale_grid, largest / divisor) == 0.0F) return;
    add_largest_gradient(w, n, divisor, grad_s[0], grad_w);
  }

  QAT_HD void search(const float* w, int64_t n, float* s) const {
    search_scale(*this, w, n, s, negative ? Signs::kBoth : Signs::kPositive);
  }

  QAT_HD Status store(const float* s, float* stored) const {
    stored[0] = round_scale(scale_grid, s[0]);
    if (s[0] != s[0]) return Status::kNotFinite;
    return magnitude(stored[0]) <= max_scale ? Status::kOk : Status::kOverflow;
  }

  /// Prepared once per block. A learned scale of 0 decodes everything to 0; dividing by infinity picks code 0
  /// for it.
  struct Encoder {
    float divisor;   ///< the stored scale
    float unstored;  ///< the scale itself: what the range of `in_range` is measured with
  };

  QAT_HD Encoder encoder(const float* s) const {
    const float stored = round_scale(scale_grid, s[0]);
    const float infinity = float_of(kInfinityBits);
    return {stored == 0.0F ? infinity : stored, s[0] == 0.0F ? infinity : s[0]};
  }

  QAT_HD int encode(float w, const Encoder& e) const {
    return round_half_even(clamp(w / e.divisor, low, high));
  }

  QAT_HD float decode(int code, const float* stored) const {
    return round_value(dequant, static_cast<float>(code) * stored[0]);
  }

  QAT_HD bool in_range(float w, const Encoder& e) const {
    return inside(w / e.unstored, static_cast<int>(low), static_cast<int>(high));
  }
};

}  // namespace qat::grid
