#pragma once

// A sub-block of a K-quant as steps.hpp has the blocks of other grids, and its gradients by the chain rule
// through both levels of its scales.

#include "qat/grid/kquant.hpp"
#include "qat/grid/steps.hpp"

namespace qat::grid {

/// A step of 0 puts every weight at position 0.
template <class F>
struct SubBlockSteps : IntegerSteps<F> {
  F divisor, step, minimum;
  int low, high;

  QAT_HD SubBlockSteps(float by, float below, int least, int greatest)
      : divisor(by == 0.0F ? float_of(kInfinityBits) : by),
        step(by),
        minimum(below),
        low(least),
        high(greatest) {}

  QAT_HD F position(F w) const { return (w + minimum) / divisor; }
  QAT_HD F level(F, F position) const { return ggml_code(position, low, high); }
  QAT_HD F weight(F level) const { return step * level - minimum; }
  QAT_HD auto inside(F, F position) const {
    return within(position, static_cast<float>(low), static_cast<float>(high));
  }
};

/// The two levels of the scales of AffineKQuant.
template <class Codec>
struct AffineLevels {
  static constexpr int kSubMins = 2 + Codec::kSubBlocks;

  template <class F>
  static QAT_HD SubBlockSteps<F> steps(const float* stored, int sub) {
    const typename Codec::Step by = Codec::step(stored, sub);
    return {by.scale, by.minimum, 0, Codec::kInfo.code_max};
  }

  /// d/d step and d/d (-minimum) of one sub-block -> its share of the gradient, which begins as zeros.
  static QAT_HD void add(const BlockSums& sums, const float* stored, int sub, float* grad_s) {
    grad_s[0] += sums.scale * stored[2 + sub];
    grad_s[1] -= sums.offset * stored[kSubMins + sub];
    grad_s[2 + sub] = sums.scale * stored[0];
    grad_s[kSubMins + sub] = -sums.offset * stored[1];
  }
};

/// The two levels of the scales of SymmetricKQuant.
template <class Codec>
struct SymmetricLevels {
  template <class F>
  static QAT_HD SubBlockSteps<F> steps(const float* stored, int sub) {
    return {Codec::step(stored, sub), 0.0F, Codec::kInfo.code_min, Codec::kInfo.code_max};
  }

  static QAT_HD void add(const BlockSums& sums, const float* stored, int sub, float* grad_s) {
    grad_s[0] += sums.scale * stored[1 + sub];
    grad_s[1 + sub] = sums.scale * stored[0];
  }
};

template <class Codec>
struct LevelsOf : SymmetricLevels<Codec> {};
/// Those with minima have a `SubRule` that says how large codes are.
template <class Codec>
  requires requires { Codec::SubRule::kCodeMax; }
struct LevelsOf<Codec> : AffineLevels<Codec> {};

}  // namespace qat::grid
