#pragma once

// e2m1, the 4-bit float of mxfp4 and nvfp4: sign, 2 exponent bits, 1 fraction bit. A code is its bit pattern,
// 0 to 15. (OCP Microscaling Formats v1.0, section 5.3.3; ggml/src/ggml-quants.c `best_index_mxfp4`)

#include "qat/grid/device.hpp"
#include "qat/grid/lanes.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

inline constexpr float kE2M1Max = 6.0F;

/// 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Code 8, the negative zero, is +0 as in ggml.
QAT_HD float e2m1_value(int code) {
  const int exponent = (code >> 1) & 3;
  const int fraction = code & 1;
  const float size = exponent == 0 ? static_cast<float>(fraction) * 0.5F
                                   : static_cast<float>((2 + fraction) << exponent) * 0.25F;
  return code > 8 ? -size : size;
}

/// The code of the value nearest to w / scale, ties to the smaller magnitude; what rounds to zero has code 0,
/// whatever its sign. An infinite scale gives 0. Borders between values are exact multiples of the scale, for
/// scales of at most 20 significant bits.
QAT_HD int e2m1_code(float w, float scale) {
  const float size = magnitude(w);
  const int code = (size > 0.25F * scale ? 1 : 0) + (size > 0.75F * scale ? 1 : 0) +
                   (size > 1.25F * scale ? 1 : 0) + (size > 1.75F * scale ? 1 : 0) +
                   (size > 2.5F * scale ? 1 : 0) + (size > 3.5F * scale ? 1 : 0) +
                   (size > 5.0F * scale ? 1 : 0);
  return w < 0.0F && code != 0 ? code + 8 : code;
}

/// `e2m1_value(e2m1_code(w, scale))`. F: float or lanes of floats (lanes.hpp).
template <class F>
QAT_HD F e2m1_level(F w, F scale) {
  struct Border {
    float at;
    float step;
  };
  constexpr Border kBorders[] = {{0.25F, 0.5F}, {0.75F, 0.5F}, {1.25F, 0.5F}, {1.75F, 0.5F},
                                 {2.5F, 1.0F},  {3.5F, 1.0F},  {5.0F, 2.0F}};
  const F size = magnitude(w);
  F level = 0.0F;
  for (const Border& border : kBorders) {
    level = level + select(size > F(border.at) * scale, F(border.step), F(0.0F));
  }
  return select((w < F(0.0F)) & (level > F(0.0F)), -level, level);
}

/// The best of several scales of a block: the one whose decoded weights have the least squared error, of
/// equal ones the first. (`search_scale` is for codes that are equally far apart.)
template <class Codec>
struct BestScale {
  const float* w;
  int64_t n;
  float unit;
  float scale;
  double error;

  QAT_HD BestScale(const float* weights, int64_t count, float largest, float s)
      : w(weights), n(count), unit(error_unit(largest)), scale(s), error(error_of(s)) {}

  /// The block's error with scale s.
  QAT_HD double error_of(float s) const { return decoded_error(Codec{}, w, n, &s, unit); }

  /// Takes s where its error is less.
  QAT_HD void offer(float s) {
    const double offered = error_of(s);
    if (offered >= error) return;
    error = offered;
    scale = s;
  }
};

/// The scale of one block of mxfp4 or nvfp4: the best of the rule's, `s`, and of those that
/// `Codec::offer_near` offers. Best: BestScale or its vectorised twin.
template <class Codec, class Best>
QAT_HD float search_e2m1(const float* w, int64_t n, float largest, float s) {
  float stored;
  if (largest < kLeastSearched || Codec::store(&s, &stored) != Status::kOk) return s;
  Best best(w, n, largest, s);
  Codec::offer_near(s, best);
  return best.scale;
}

}  // namespace qat::grid
