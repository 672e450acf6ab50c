#pragma once

// Better scales for a K-quant than ggml's rule finds, in the same bytes. ggml fits each sub-block alone and
// then rounds to two levels; here the two levels are fitted together, by turns:
//
//   1. d (and dmin) held: each sub-block takes, of the integers near its sub-scale (and sub-minimum), those
//   with
//      the least squared error.
//   2. The integers and codes held: d (and dmin) by least squares over the block, rounded to fp16.
//
// Three rounds from ggml's scales (for a format that says so, from a second start as well). The best block of
// all rounds replaces ggml's if its squared error is less by more than 2^-16 of itself, which the rounding of
// these sums cannot feign: so no block gets worse.
//
// F is float or lanes of floats, as in kquant_search.hpp; sums run in the same order in both.

#include "qat/grid/f16.hpp"
#include "qat/grid/kquant_search.hpp"

namespace qat::grid {

/// Rounds of the two steps.
inline constexpr int kImproveRounds = 3;
/// A smaller gain than this, as a fraction of the error, is none.
inline constexpr double kLeastGain = 0x1p-16;
/// Sub-blocks of a block, at most.
inline constexpr int kMaxSubBlocks = 16;

/// Element i of each sub-block that an F holds -> x[i].
template <int kWeights, class F>
QAT_HD void load_sub_blocks(const float* w, F* x) {
  for (int i = 0; i < kWeights; ++i) gather_lanes(w + i, kWeights, x + i);
}

/// An integer parameter moved by `by`, held in [low, high].
template <class F>
QAT_HD F moved(F value, int by, int low, int high) {
  return lesser(greater(value + F(static_cast<float>(by)), F(static_cast<float>(low))),
                F(static_cast<float>(high)));
}

/// 1 / scale; 0 for 0, which gives code 0.
template <class F>
QAT_HD F step_inverse(F scale) {
  return select(scale == F(0.0F), F(0.0F), F(1.0F) / scale);
}

/// Per sub-block, with the codes l of its present scales: the sums that a refit needs.
struct SubBlockSums {
  float error[kMaxSubBlocks];
  float l[kMaxSubBlocks];
  float l2[kMaxSubBlocks];
  float x[kMaxSubBlocks];
  float xl[kMaxSubBlocks];

  /// Over the first sub-blocks of a block.
  QAT_HD double total_error(int sub_blocks) const {
    double total = 0.0;
    for (int sub = 0; sub < sub_blocks; ++sub) total += static_cast<double>(error[sub]);
    return total;
  }
};

/// Squared error of x under scale * code - minimum, codes kLow..kHigh; into `sums` at `sub` where not null.
template <int kWeights, int kLow, int kHigh, class F>
QAT_HD F square_error(const F* x, F scale, F minimum, int sub = 0, SubBlockSums* sums = nullptr) {
  const F inverse = step_inverse(scale);
  F error = 0.0F;
  F sum_l = 0.0F;
  F sum_l2 = 0.0F;
  F sum_x = 0.0F;
  F sum_xl = 0.0F;
  for (int i = 0; i < kWeights; ++i) {
    const F code = ggml_code((x[i] + minimum) * inverse, kLow, kHigh);
    const F difference = scale * code - minimum - x[i];
    error = error + difference * difference;
    if (sums == nullptr) continue;
    sum_l = sum_l + code;
    sum_l2 = sum_l2 + code * code;
    sum_x = sum_x + x[i];
    sum_xl = sum_xl + x[i] * code;
  }
  if (sums != nullptr) {
    put_lanes(error, sums->error + sub);
    put_lanes(sum_l, sums->l + sub);
    put_lanes(sum_l2, sums->l2 + sub);
    put_lanes(sum_x, sums->x + sub);
    put_lanes(sum_xl, sums->xl + sub);
  }
  return error;
}

/// Step 1 with minima: sub-scales and sub-minima of `stored` move by at most 1 each.
template <class Codec, class F>
QAT_HD void settle_affine(const float* w, float* stored, SubBlockSums* sums) {
  constexpr int kWeights = Codec::kWeights;
  constexpr int kHigh = Codec::SubRule::kCodeMax;
  constexpr int kMost = Codec::SubRule::kScaleMax;
  float* sub_scales = stored + 2;
  float* sub_mins = stored + 2 + Codec::kSubBlocks;
  const F d = stored[0];
  const F dmin = stored[1];
  for (int sub = 0; sub < Codec::kSubBlocks; sub += kLanes<F>) {
    F x[kWeights];
    F scale;
    F minimum;
    load_sub_blocks<kWeights>(w + sub * kWeights, x);
    gather_lanes(sub_scales + sub, 1, &scale);
    gather_lanes(sub_mins + sub, 1, &minimum);
    F best_scale = scale;
    F best_minimum = minimum;
    F least = square_error<kWeights, 0, kHigh>(x, d * scale, dmin * minimum);
    for (int move = 0; move < 9; ++move) {
      const F near_scale = moved(scale, move / 3 - 1, 0, kMost);
      const F near_minimum = moved(minimum, move % 3 - 1, 0, kMost);
      const F error = square_error<kWeights, 0, kHigh>(x, d * near_scale, dmin * near_minimum);
      const auto better = error < least;
      least = select(better, error, least);
      best_scale = select(better, near_scale, best_scale);
      best_minimum = select(better, near_minimum, best_minimum);
    }
    put_lanes(best_scale, sub_scales + sub);
    put_lanes(best_minimum, sub_mins + sub);
    square_error<kWeights, 0, kHigh>(x, d * best_scale, dmin * best_minimum, sub, sums);
  }
}

/// Step 2 with minima. False when nothing legal comes out.
template <class Codec>
QAT_HD bool refit_affine(const SubBlockSums& sums, float* stored) {
  double aa = 0.0;
  double ab = 0.0;
  double bb = 0.0;
  double ax = 0.0;
  double bx = 0.0;
  for (int sub = 0; sub < Codec::kSubBlocks; ++sub) {
    const double scale = stored[2 + sub];
    const double minimum = -stored[2 + Codec::kSubBlocks + sub];
    aa += scale * scale * sums.l2[sub];
    ab += scale * minimum * sums.l[sub];
    bb += minimum * minimum * Codec::kWeights;
    ax += scale * sums.xl[sub];
    bx += minimum * sums.x[sub];
  }
  const double determinant = aa * bb - ab * ab;
  double d = (ax * bb - bx * ab) / determinant;
  double dmin = (bx * aa - ax * ab) / determinant;
  if (!(determinant > 0.0) || dmin < 0.0) {
    d = ax / aa;
    dmin = 0.0;
  }
  const Status scale = store_f16(static_cast<float>(d), stored);
  return scale == Status::kOk && store_f16(static_cast<float>(dmin), stored + 1) == Status::kOk &&
         stored[0] > 0.0F;
}

/// Step 1 without minima: sub-scales move by at most 2.
template <class Codec, class F>
QAT_HD void settle_symmetric(const float* w, float* stored, SubBlockSums* sums) {
  using Rule = typename Codec::SubRule;
  constexpr int kWeights = Codec::kWeights;
  constexpr int kLow = -Rule::kLevels;
  constexpr int kHigh = Rule::kLevels - 1;
  const F d = stored[0];
  for (int sub = 0; sub < Codec::kSubBlocks; sub += kLanes<F>) {
    F x[kWeights];
    F scale;
    load_sub_blocks<kWeights>(w + sub * kWeights, x);
    gather_lanes(stored + 1 + sub, 1, &scale);
    F best = scale;
    F least = square_error<kWeights, kLow, kHigh>(x, d * scale, F(0.0F));
    for (int move = -2; move <= 2; ++move) {
      const F near = moved(scale, move, Rule::kScaleMin, Rule::kScaleMax);
      const F error = square_error<kWeights, kLow, kHigh>(x, d * near, F(0.0F));
      const auto better = error < least;
      least = select(better, error, least);
      best = select(better, near, best);
    }
    put_lanes(best, stored + 1 + sub);
    square_error<kWeights, kLow, kHigh>(x, d * best, F(0.0F), sub, sums);
  }
}

/// Step 2 without minima.
template <class Codec>
QAT_HD bool refit_symmetric(const SubBlockSums& sums, float* stored) {
  double aa = 0.0;
  double ax = 0.0;
  for (int sub = 0; sub < Codec::kSubBlocks; ++sub) {
    const double scale = stored[1 + sub];
    aa += scale * scale * sums.l2[sub];
    ax += scale * sums.xl[sub];
  }
  return aa > 0.0 && store_f16(static_cast<float>(ax / aa), stored) == Status::kOk && stored[0] != 0.0F;
}

/// The rounds, from the stored scales `start`: where they find less than `least` by enough, `s` and `least`
/// become theirs.
template <class Codec, class F>
QAT_HD void improve(const float* w, const float* start, double* least, float* s) {
  float trial[Codec::kParams];
  for (int i = 0; i < Codec::kParams; ++i) trial[i] = start[i];
  for (int round = 0; round < kImproveRounds; ++round) {
    SubBlockSums sums;
    Codec::template settle<F>(w, trial, &sums);
    const double error = sums.total_error(Codec::kSubBlocks);
    if (error < *least * (1.0 - kLeastGain)) {
      *least = error;
      for (int i = 0; i < Codec::kParams; ++i) s[i] = trial[i];
    }
    if (!Codec::refit(sums, trial)) return;
  }
}

}  // namespace qat::grid
