#pragma once

// The twin of qat/grid/search.hpp for codecs with a scale and an offset, w_hat = (code - least) * d + m:
// eight pairs of clipped ends of the block, of which the best is improved by a straight line through codes
// and weights.
//
//   1. x = (w - centre) as integers of 1/32767 of half the block's range.
//   2. Candidates: the lowest and the highest code at the ends of the range, moved inwards by parts of it.
//   3. For each, the codes q by rounding; the line x = d q + m through them leaves the error var(x) -
//      cov(x,q)^2 / var(q). The least wins.
//   4. As in search.hpp: the winner is stored, and replaces the reference's scales if the block that decodes
//      from it has a smaller squared error.

#include "qat/grid/search.hpp"

namespace qat::grid {

/// Parts of the block's range by which a candidate moves its lower and its upper end inwards.
struct Inset {
  float low;
  float high;
};

/// Candidate j. Few levels clip more.
QAT_HD Inset search_inset(int levels, int j) {
  constexpr Inset kFew[kCandidates] = {{0.0F, 0.0F}, {0.1F, 0.1F}, {0.2F, 0.2F},  {0.3F, 0.3F},
                                       {0.1F, 0.2F}, {0.2F, 0.1F}, {0.0F, 0.15F}, {0.15F, 0.0F}};
  constexpr Inset kMany[kCandidates] = {{-0.02F, -0.02F}, {0.02F, 0.02F}, {0.06F, 0.06F}, {0.0F, 0.05F},
                                        {0.05F, 0.0F},    {0.1F, 0.1F},   {0.1F, 0.03F},  {0.03F, 0.1F}};
  constexpr Inset kFine[kCandidates] = {{-0.004F, -0.004F}, {0.0F, 0.0F},     {0.002F, 0.002F},
                                        {0.0F, 0.004F},     {0.004F, 0.0F},   {0.004F, 0.004F},
                                        {-0.002F, 0.002F},  {0.002F, -0.002F}};
  if (levels <= 4) return kFew[j];
  return levels <= 64 ? kMany[j] : kFine[j];
}

/// How candidate j turns x into a code: (x * multiplier / 2^15 + shift) / 2^kCodeFraction, rounded. The codes
/// are counted from -levels / 2, so that 16 bits hold them before they are rounded.
struct LineCode {
  int multiplier;
  int shift;
};

/// Of candidate j.
QAT_HD LineCode line_code(int levels, int j) {
  const Inset inset = search_inset(levels, j);
  const float width = 1.0F - inset.low - inset.high;  // of the range, that is of 2 * 32767 in x
  const float steps = static_cast<float>((levels - 1) << kCodeFraction) / width;
  const float least = static_cast<float>((levels / 2) << kCodeFraction);
  return {static_cast<int>(steps * 0.5F), static_cast<int>(steps * (0.5F - inset.low) - least)};
}

/// Sums of one candidate's codes over a block.
struct LineSums {
  int64_t q[kCandidates];
  int64_t qq[kCandidates];
  int64_t xq[kCandidates];
};

/// x = scale * (code - least code) + offset.
struct Line {
  float scale;
  float offset;
};

/// The best candidate's line in units of x; a scale of 0 when no candidate has two different codes.
/// x: the sum of all x.
QAT_HD Line best_line(int levels, int64_t n, int64_t x, const LineSums& sums) {
  const auto count = static_cast<float>(n);
  const auto sum_x = static_cast<float>(x);
  float best = 0.0F;
  Line line{0.0F, 0.0F};
  for (int j = 0; j < kCandidates; ++j) {
    const auto q = static_cast<float>(sums.q[j]);
    const float covariance = count * static_cast<float>(sums.xq[j]) - sum_x * q;
    const float variance = count * static_cast<float>(sums.qq[j]) - q * q;
    const float gain = covariance * covariance / (variance > 0.0F ? variance : 1.0F);
    if (variance > 0.0F && gain > best) {
      best = gain;
      const float scale = covariance / variance;
      line = {scale, (sum_x - scale * q) / count - scale * static_cast<float>(levels / 2)};
    }
  }
  return line;
}

/// Where the x of a block come from.
struct LineUnit {
  float centre;
  float half;  ///< half the range of the block

  /// The x of a weight.
  QAT_HD int integer(float w) const {
    constexpr auto kMost = static_cast<float>(kSearchUnit);
    return round_half_even(clamp((w - centre) * (kMost / half), -kMost, kMost));
  }
};

/// Of a block between these ends.
QAT_HD LineUnit line_unit(float least, float greatest) {
  return {0.5F * greatest + 0.5F * least, 0.5F * greatest - 0.5F * least};
}

/// Of a block w[n].
QAT_HD LineUnit line_unit(const float* w, int64_t n) {
  float least = w[0];
  float greatest = w[0];
  for (int64_t i = 1; i < n; ++i) {
    least = w[i] < least ? w[i] : least;
    greatest = w[i] > greatest ? w[i] : greatest;
  }
  return line_unit(least, greatest);
}

/// A line in units of x, in those of w.
QAT_HD Line in_weights(const Line& line, const LineUnit& unit) {
  const float back = unit.half / static_cast<float>(kSearchUnit);
  return {back * line.scale, unit.centre + back * line.offset};
}

/// Steps 1 to 3, back in the units of w.
QAT_HD Line suggest_line(int levels, const float* w, int64_t n, const LineUnit& unit) {
  LineCode codes[kCandidates];
  for (int j = 0; j < kCandidates; ++j) codes[j] = line_code(levels, j);
  LineSums sums{};
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int x = unit.integer(w[i]);
    total += x;
    for (int j = 0; j < kCandidates; ++j) {
      const int fine = ((x * codes[j].multiplier + (1 << 14)) >> 15) + codes[j].shift;
      const int rounded = (fine + (1 << (kCodeFraction - 1))) >> kCodeFraction;
      const int q = search_clamp(rounded, -(levels / 2), levels - 1 - levels / 2);
      sums.q[j] += q;
      sums.qq[j] += static_cast<int64_t>(q) * q;
      sums.xq[j] += static_cast<int64_t>(x) * q;
    }
  }
  return in_weights(best_line(levels, n, total, sums), unit);
}

/// What the file holds of a line; false when it cannot, or when the line has no slope.
template <class Codec>
QAT_HD bool stored_line(const Codec& codec, const Line& line, float* stored) {
  float found[2] = {line.scale, line.offset};
  if constexpr (requires { codec.line(line.scale, line.offset, found); }) {
    codec.line(line.scale, line.offset, found);
  }
  return line.scale != 0.0F && codec.store(found, stored) == Status::kOk;
}

/// The scale and the offset of one block: never a greater squared error than that of `choose`, and the
/// reference's own parameters where nothing better is found. A codec whose parameters are not (d, m) converts
/// them by `line(d, m, s)`. w: float32[n], finite -> s: float32[2].
template <class Codec>
QAT_HD void search_scale_and_offset(const Codec& codec, const float* w, int64_t n, float* s) {
  codec.choose(w, n, s);
  const LineUnit unit = line_unit(w, n);
  if (!(unit.half >= kLeastSearched)) return;
  const Info& info = info_of(codec);
  const Line line = suggest_line(info.code_max - info.code_min + 1, w, n, unit);
  float stored[2];
  if (!stored_line(codec, line, stored)) return;
  const float error = error_unit(absolute_maximum(w, n));
  if (decoded_error(codec, w, n, stored, error) < decoded_error(codec, w, n, s, error)) {
    s[0] = stored[0];
    s[1] = stored[1];
  }
}

}  // namespace qat::grid
