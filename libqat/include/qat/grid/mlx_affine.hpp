#pragma once

// mlx2_g32 ... mlx8_g128 (MLX, mode "affine"): a scale and a bias per group; w_hat = level * scale + bias,
// levels 0 .. 2^b - 1. Scales and biases have one dtype, which is also that of the arithmetic: the product is
// rounded to it, then the sum. Codes are the levels, those of 8 bits less 128.
//
// Rule (mx.quantize): s0 = max((max - min) / (2^b - 1), 1e-7), negative unless |min| > |max|; edge = the end
// of larger magnitude, max when they are equal; q = rint(edge / s0). Where q is not 0, scale = edge / q and
// bias = edge, so that the edge decodes to itself; else scale = s0 and bias = 0. Levels are picked with the
// unrounded scale and bias: clamp(rint((w - bias) / scale)), half to even.
// (mlx/backend/cpu/quantized.cpp, mlx/ops.cpp affine_dequantize)

#include "qat/grid/rounding.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search_line.hpp"

namespace qat::grid {

struct MlxAffine {
  const Info* grid;  ///< outlives the codec; not for device code
  int64_t block;     ///< as in Info
  DType dtype;       ///< of scales, biases, products and sums: kF32, kF16 or kBF16
  float levels;      ///< the greatest level, 2^b - 1
  int first;         ///< the code of level 0

  const Info& info() const { return *grid; }

  /// Nearest integer, ties to even, of any magnitude.
  static QAT_HD float nearest(float value) {
    const float size = magnitude(value);
    if (size >= 0x1p23F) return value;
    const float rounded = (size + 0x1p23F) - 0x1p23F;
    return value < 0.0F ? -rounded : rounded;
  }

  /// The rule, from the ends of a group.
  QAT_HD void scales_of(float least, float greatest, float* s) const {
    const bool low_edge = magnitude(least) > magnitude(greatest);
    const float step = (greatest - least) / levels;
    const float size = step > 1e-7F ? step : 1e-7F;
    const float scale = low_edge ? size : -size;
    const float edge = low_edge ? least : greatest;
    const float level = nearest(edge / scale);
    s[0] = level != 0.0F ? edge / level : scale;
    s[1] = level != 0.0F ? edge : 0.0F;
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

  /// scale = edge / level and bias = edge, with the level held; where it is 0 both are constants of the rule.
  QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) const {
    const EndPlaces ends = places_of_ends(w, n);
    float s[2];
    scales_of(w[ends.least], w[ends.greatest], s);
    if (s[1] == 0.0F) return;
    const int64_t edge = s[1] == w[ends.least] ? ends.least : ends.greatest;
    grad_w[edge] += grad_s[0] * (s[0] / s[1]) + grad_s[1];
  }

  QAT_HD void search(const float* w, int64_t n, float* s) const { search_scale_and_offset(*this, w, n, s); }

  QAT_HD float level_value(float level, const float* stored) const {
    return round_value(dtype, round_value(dtype, level * stored[0]) + stored[1]);
  }

  /// kOverflow where the greatest level, or its product with the scale, would not be finite.
  QAT_HD Status store(const float* s, float* stored) const {
    stored[0] = round_value(dtype, s[0]);
    stored[1] = round_value(dtype, s[1]);
    if (s[0] != s[0] || s[1] != s[1]) return Status::kNotFinite;
    const float most = largest_value(dtype);
    const bool fits = magnitude(stored[0] * levels) <= most && magnitude(stored[1]) <= most &&
                      magnitude(level_value(levels, stored)) <= most;
    return fits ? Status::kOk : Status::kOverflow;
  }

  /// Prepared once per block. A learned scale of 0 decodes everything to the bias; dividing by infinity picks
  /// level 0 for it.
  struct Encoder {
    float scale;
    float bias;
  };

  QAT_HD Encoder encoder(const float* s) const {
    return {s[0] == 0.0F ? float_of(kInfinityBits) : s[0], s[1]};
  }

  QAT_HD int encode(float w, const Encoder& e) const {
    return round_half_even(clamp((w - e.bias) / e.scale, 0.0F, levels)) + first;
  }

  QAT_HD float decode(int code, const float* stored) const {
    return level_value(static_cast<float>(code - first), stored);
  }

  QAT_HD bool in_range(float w, const Encoder& e) const {
    return inside((w - e.bias) / e.scale, 0, static_cast<int>(levels));
  }
};

}  // namespace qat::grid
