#pragma once

// Better scales than a consumer's own rule finds, in the same bytes and legal for the same decoder.
//
// The least squared error over scales has many local minima, so a search tries eight scales and improves the
// best one:
//
//   1. x = the block's weights as integers of 1/32767 of its largest magnitude a.
//   2. Candidates c_0..c_7: scales between the best one for normally distributed weights of the same mean
//      magnitude (J. Max, Quantizing for minimum distortion, 1960) and a little more than the one that clips
//      nothing. Where the code range is lopsided and the decoder takes a negative scale: four, of both signs.
//   3. For each, the codes q of x by rounding; with these codes the best scale is <x,q> / <q,q>, and leaves
//      the error |x|^2 - <x,q>^2 / <q,q>. The least error wins.
//   4. The winner is stored, and replaces the reference's scale if the block that decodes from it, with the
//      codec's own rounding, has a smaller squared error than the reference's has. So no block gets worse.
//
// Steps 1 to 3 sum integers, step 4 sums in eight lanes (see `ErrorSum`): vectorised versions are equal bit
// for bit.

#include "qat/grid/device.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// Whether the consumers of a format read a negative scale.
enum class Signs { kPositive, kBoth };

/// Largest x.
inline constexpr int kSearchUnit = 32767;
/// Candidates of one search.
inline constexpr int kCandidates = 8;
/// Weights that are summed in float32 and in int32 before they are added to a float64 and an int64.
inline constexpr int64_t kSearchChunk = 256;
/// Fraction bits of a candidate's codes before they are rounded.
inline constexpr int kCodeFraction = 7;
/// Blocks whose largest magnitude is below this keep the reference's scale: 32767 / a would overflow.
inline constexpr float kLeastSearched = 0x1p-100F;

/// The step of the best uniform quantizer of that many levels for a standard normal variable, over the mean
/// magnitude of that variable.
QAT_HD float normal_step(int levels) {
  constexpr float kMeanMagnitude = 0.79788456F;
  if (levels <= 3) return 1.2240F / kMeanMagnitude;
  if (levels <= 4) return 0.9957F / kMeanMagnitude;
  if (levels <= 8) return 0.5860F / kMeanMagnitude;
  if (levels <= 16) return 0.3352F / kMeanMagnitude;
  if (levels <= 32) return 0.1881F / kMeanMagnitude;
  if (levels <= 64) return 0.1041F / kMeanMagnitude;
  return 0.0308F / kMeanMagnitude;
}

/// The codes that a search may use.
struct SearchRange {
  int low;
  int high;
  bool both;  ///< four candidates of both signs rather than eight positive ones

  /// The largest magnitude of a code.
  QAT_HD int reach() const { return -low > high ? -low : high; }
  /// The number of different magnitudes of a scale that are tried.
  QAT_HD int magnitudes() const { return both ? kCandidates / 2 : kCandidates; }
};

/// A codec's constants, whether they are known when it is compiled or when it is made.
template <class Codec>
QAT_HD const Info& info_of(const Codec& codec) {
  if constexpr (requires { codec.info(); }) {
    return codec.info();
  } else {
    return Codec::kInfo;
  }
}

/// What a search over that format's scales may use.
QAT_HD SearchRange search_range(const Info& info, Signs signs) {
  const bool lopsided = info.code_min != -info.code_max && info.code_max < 64;
  return {info.code_min, info.code_max, lopsided && signs == Signs::kBoth};
}

/// The two ends of the candidates, as multiples of the scale that gives a code of `reach` to the largest
/// weight.
struct Ladder {
  float first;
  float step;
};

/// magnitudes: the sum of |x| over n weights.
QAT_HD Ladder search_ladder(const SearchRange& range, int64_t magnitudes, int64_t n) {
  const auto reach = static_cast<float>(range.reach());
  const float mean = static_cast<float>(magnitudes) / (static_cast<float>(n) * kSearchUnit);
  const float normal = normal_step(range.high - range.low + 1) * reach * mean;
  const bool fine = reach >= 64.0F;  // clipping costs more than the finer steps of a smaller scale save
  const float first = (normal < 1.0F ? normal : 1.0F) * (fine ? 0.99F : 0.9F);
  const float last = fine ? 1.04F : 1.06F;
  return {first, (last - first) / static_cast<float>(range.magnitudes() - 1)};
}

/// What x is multiplied with to get codes of kCodeFraction + 15 fraction bits, for candidate j of a ladder.
QAT_HD int search_multiplier(const SearchRange& range, const Ladder& ladder, int j) {
  const float scale = ladder.first + ladder.step * static_cast<float>(j);
  const float multiplier = static_cast<float>(range.reach() << kCodeFraction) / scale;
  return static_cast<int>(multiplier < 32000.0F ? multiplier : 32000.0F);
}

/// <x,q> and <q,q> of every candidate. The second half holds the negative scales, where there are any, with
/// the signs of their codes turned, so that <x,q> is never negative.
struct SearchSums {
  int64_t xq[kCandidates];
  int64_t qq[kCandidates];
};

/// The best scale in units of x; 0 when no candidate has a code other than 0.
QAT_HD float best_of(const SearchRange& range, const SearchSums& sums) {
  float best = 0.0F;
  float scale = 0.0F;
  for (int j = 0; j < kCandidates; ++j) {
    const auto xq = static_cast<float>(sums.xq[j]);
    const auto qq = static_cast<float>(sums.qq[j] > 0 ? sums.qq[j] : 1);
    if (xq * xq / qq > best) {
      best = xq * xq / qq;
      scale = range.both && j >= kCandidates / 2 ? -(xq / qq) : xq / qq;
    }
  }
  return scale;
}

/// A sum of squares, term i in lane i mod 8, the lanes added pairwise: 4 apart, then 2, then 1.
struct ErrorSum {
  float lanes[8];

  /// Nothing added yet.
  static QAT_HD ErrorSum zero() { return {{0.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F}}; }
  /// Adds the square of term i.
  QAT_HD void add(int64_t i, float error) { lanes[i & 7] += error * error; }
  /// The sum of all lanes.
  QAT_HD float total() const {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
};

/// The power of two that takes a magnitude to [1, 4), so that squares neither overflow nor vanish.
QAT_HD float error_unit(float largest) {
  const int exponent = static_cast<int>(bits_of(largest) >> 23);
  return float_of(static_cast<uint32_t>(exponent < 254 ? 254 - exponent : 1) << 23);
}

/// The squared error of the block that decodes from scales s, in squares of 1 / unit; infinite when the file
/// cannot hold s.
template <class Codec>
QAT_HD double decoded_error(const Codec& codec, const float* w, int64_t n, const float* s, float unit) {
  float stored[kMaxParams];
  if (codec.store(s, stored) != Status::kOk) return static_cast<double>(float_of(kInfinityBits));
  const auto encoder = codec.encoder(s);
  double total = 0.0;
  for (int64_t first = 0; first < n; first += kSearchChunk) {
    ErrorSum sum = ErrorSum::zero();
    const int64_t last = n - first < kSearchChunk ? n : first + kSearchChunk;
    for (int64_t i = first; i < last; ++i) {
      sum.add(i - first, (w[i] - codec.decode(codec.encode(w[i], encoder), stored)) * unit);
    }
    total += static_cast<double>(sum.total());
  }
  return total;
}

/// Into [low, high].
QAT_HD int search_clamp(int code, int low, int high) {
  const int raised = code > low ? code : low;
  return raised < high ? raised : high;
}

/// Adds one weight to the sums of every candidate. multipliers: int[range.magnitudes()].
QAT_HD void add_weight(const SearchRange& range, const int* multipliers, int x, SearchSums& sums) {
  const int count = range.magnitudes();
  for (int j = 0; j < count; ++j) {
    const int fine = (x * multipliers[j] + (1 << 14)) >> 15;
    const int code = (fine + (1 << (kCodeFraction - 1))) >> kCodeFraction;
    const int plus = search_clamp(code, range.low, range.high);
    sums.xq[j] += static_cast<int64_t>(x) * plus;
    sums.qq[j] += static_cast<int64_t>(plus) * plus;
    if (!range.both) continue;
    const int minus = search_clamp(code, -range.high, -range.low);
    sums.xq[j + count] += static_cast<int64_t>(x) * minus;
    sums.qq[j + count] += static_cast<int64_t>(minus) * minus;
  }
}

/// Steps 1 to 3 of the search. w: float32[n] of largest magnitude `largest` -> the scale that they suggest.
QAT_HD float suggest_scale(const SearchRange& range, const float* w, int64_t n, float largest) {
  const float unit = static_cast<float>(kSearchUnit) / largest;
  int64_t magnitudes = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int x = round_half_even(w[i] * unit);
    magnitudes += x < 0 ? -x : x;
  }
  const Ladder ladder = search_ladder(range, magnitudes, n);
  int multipliers[kCandidates];
  for (int j = 0; j < range.magnitudes(); ++j) multipliers[j] = search_multiplier(range, ladder, j);
  SearchSums sums{};
  for (int64_t i = 0; i < n; ++i) add_weight(range, multipliers, round_half_even(w[i] * unit), sums);
  return largest / static_cast<float>(kSearchUnit) * best_of(range, sums);
}

/// The scale of one block of a codec with a single scale and w_hat = code * s: never a greater squared error
/// than that of `choose`, and the reference's own scale where nothing better is found.
/// w: float32[n], finite -> s: float32[1].
template <class Codec>
QAT_HD void search_scale(const Codec& codec, const float* w, int64_t n, float* s,
                         Signs signs = Signs::kBoth) {
  codec.choose(w, n, s);
  const float largest = absolute_maximum(w, n);
  if (largest < kLeastSearched) return;
  const float suggested = suggest_scale(search_range(info_of(codec), signs), w, n, largest);
  float stored;
  if (suggested == 0.0F || codec.store(&suggested, &stored) != Status::kOk) return;
  const float unit = error_unit(largest);
  if (decoded_error(codec, w, n, &stored, unit) < decoded_error(codec, w, n, s, unit)) s[0] = stored;
}

}  // namespace qat::grid
