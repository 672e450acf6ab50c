#pragma once

// ggml's searches for the scale of one sub-block of a K-quant, written once for one sub-block (F = float) and
// for several side by side (F = a vector of floats, one lane a sub-block). Sums run over the weights of a
// sub-block in their order, as in the C code, so every F gives the same bits.
// (ggml/src/ggml-quants.c: make_qkx2_quants, make_qx_quants, make_q3_quants)
//
// An F has + - * /, comparisons whose results have & and fit `select`, and the functions of lanes.hpp.

#include "qat/grid/lanes.hpp"

namespace qat::grid {

/// ggml's `nearest_int`, held in [low, high]: ties to even up to 2^22, and by the same bits as in ggml
/// beyond: an infinity counts as -2^22 and the NaN of 0 * infinity as 0.
QAT_HD float ggml_code(float value, int low, int high) {
  const int code = static_cast<int>(bits_of(value + 12582912.0F) & 0x7fffffU) - 0x400000;
  return static_cast<float>(code < low ? low : code > high ? high : code);
}

/// Sub-blocks whose largest magnitude is below this have no scale (ggml's GROUP_MAX_EPS).
inline constexpr float kNoScale = 1e-15F;

/// w ~ scale * code - minimum; minimum >= 0.
template <class F>
struct AffineFit {
  F scale;
  F minimum;
};

/// The weighted error of the codes; `Rule::kAbsolute`: of distances rather than of their squares.
template <class Rule, class F>
QAT_HD F affine_error(const F* x, const F* weights, const F* codes, F scale, F low) {
  F error = 0.0F;
  for (int i = 0; i < Rule::kWeights; ++i) {
    const F difference = scale * codes[i] + low - x[i];
    error = error + weights[i] * (Rule::kAbsolute ? magnitude(difference) : difference * difference);
  }
  return error;
}

/// One candidate of `affine_fit`: codes at steps of 1 / inverse above `low`, then the line through them by
/// weighted least squares, with a minimum that is not above 0. False where there is no such line.
template <class Rule, class F>
QAT_HD auto affine_candidate(const F* x, const F* weights, F sum_w, F sum_x, F inverse, F low, F* codes,
                             AffineFit<F>* line) {
  F sum_l = 0.0F;
  F sum_l2 = 0.0F;
  F sum_xl = 0.0F;
  for (int i = 0; i < Rule::kWeights; ++i) {
    codes[i] = ggml_code(inverse * (x[i] - low), 0, Rule::kCodeMax);
    const F weighted = weights[i] * codes[i];
    sum_l = sum_l + weighted;
    sum_l2 = sum_l2 + weighted * codes[i];
    sum_xl = sum_xl + weighted * x[i];
  }
  const F determinant = sum_w * sum_l2 - sum_l * sum_l;
  const F slope = (sum_w * sum_xl - sum_x * sum_l) / determinant;
  const F offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
  const auto above = offset > 0.0F;
  line->scale = select(above, sum_xl / sum_l2, slope);
  line->minimum = select(above, 0.0F, offset);
  return determinant > 0.0F;
}

/// make_qkx2_quants. x: F[Rule::kWeights]. codes: the codes of the fit, as floats; may be null.
template <class Rule, class F>
QAT_HD AffineFit<F> affine_fit(const F* x, F* codes) {
  constexpr int kWeights = Rule::kWeights;
  F weights[kWeights];
  Rule::weigh(x, weights);
  F low = x[0];
  F high = x[0];
  F sum_w = weights[0];
  F sum_x = sum_w * x[0];
  for (int i = 1; i < kWeights; ++i) {
    low = lesser(x[i], low);
    high = greater(x[i], high);
    sum_w = sum_w + weights[i];
    sum_x = sum_x + weights[i] * x[i];
  }
  low = select(low > 0.0F, F(0.0F), low);
  const auto constant = high == low;
  const F first_low = low;

  F trial[kWeights];
  F inverse = F(static_cast<float>(Rule::kCodeMax)) / (high - low);
  F scale = F(1.0F) / inverse;
  for (int i = 0; i < kWeights; ++i) trial[i] = ggml_code(inverse * (x[i] - low), 0, Rule::kCodeMax);
  F best = affine_error<Rule>(x, weights, trial, scale, low);
  for (int i = 0; codes != nullptr && i < kWeights; ++i) codes[i] = trial[i];
  for (int step = 0; step <= Rule::kSteps; ++step) {
    const float range = Rule::kFirst + Rule::kStep * static_cast<float>(step) + Rule::kCodeMax;
    AffineFit<F> line;
    const auto exists =
        affine_candidate<Rule>(x, weights, sum_w, sum_x, F(range) / (high - low), low, trial, &line);
    const F error = affine_error<Rule>(x, weights, trial, line.scale, line.minimum);
    const auto better = exists & (error < best);
    best = select(better, error, best);
    scale = select(better, line.scale, scale);
    low = select(better, line.minimum, low);
    for (int i = 0; codes != nullptr && i < kWeights; ++i) codes[i] = select(better, trial[i], codes[i]);
  }
  for (int i = 0; codes != nullptr && i < kWeights; ++i) codes[i] = select(constant, F(0.0F), codes[i]);
  return {select(constant, F(0.0F), scale), -select(constant, first_low, low)};
}

/// The largest magnitude of n weights, and the first weight that has it.
template <class F>
struct Largest {
  F size;
  F signed_value;
};

/// Of x[n].
template <class F>
QAT_HD Largest<F> first_largest(const F* x, int n) {
  Largest<F> largest{0.0F, 0.0F};
  for (int i = 0; i < n; ++i) {
    const F size = magnitude(x[i]);
    const auto more = size > largest.size;
    largest.size = select(more, size, largest.size);
    largest.signed_value = select(more, x[i], largest.signed_value);
  }
  return largest;
}

/// Least squares of w ~ scale * code with weights w^2: scale = sums.xl / sums.l2.
template <class F>
struct CodeSums {
  F xl = 0.0F;
  F l2 = 0.0F;
};

/// Codes -kLevels..kLevels - 1 at steps of 1 / inverse.
template <int kWeights, int kLevels, class F>
QAT_HD CodeSums<F> symmetric_candidate(const F* x, F inverse, F* codes) {
  CodeSums<F> sums;
  for (int i = 0; i < kWeights; ++i) {
    codes[i] = ggml_code(inverse * x[i], -kLevels, kLevels - 1);
    const F weight = x[i] * x[i];
    sums.xl = sums.xl + weight * x[i] * codes[i];
    sums.l2 = sums.l2 + weight * codes[i] * codes[i];
  }
  return sums;
}

/// make_qx_quants with weights w^2. x: F[kWeights] -> scale, of either sign. codes: may be null.
template <int kWeights, int kLevels, class F>
QAT_HD F symmetric_fit(const F* x, F* codes) {
  const Largest<F> largest = first_largest(x, kWeights);
  const auto none = largest.size < kNoScale;
  F scale = 0.0F;
  if (!everywhere(none)) {
    F trial[kWeights];
    const F inverse = F(static_cast<float>(-kLevels)) / largest.signed_value;
    const CodeSums<F> first = symmetric_candidate<kWeights, kLevels>(x, inverse, trial);
    scale = select(first.l2 == 0.0F, F(0.0F), first.xl / first.l2);
    F best = scale * first.xl;
    for (int i = 0; codes != nullptr && i < kWeights; ++i) codes[i] = trial[i];
    for (int step = -9; step <= 9; ++step) {
      if (step == 0) continue;
      const float range = static_cast<float>(kLevels) + 0.1F * static_cast<float>(step);
      const CodeSums<F> sums =
          symmetric_candidate<kWeights, kLevels>(x, F(-range) / largest.signed_value, trial);
      const auto better = (sums.l2 > 0.0F) & (sums.xl * sums.xl > best * sums.l2);
      scale = select(better, sums.xl / sums.l2, scale);
      best = select(better, scale * sums.xl, best);
      for (int i = 0; codes != nullptr && i < kWeights; ++i) codes[i] = select(better, trial[i], codes[i]);
    }
  }
  const F lowest = static_cast<float>(-kLevels);
  for (int i = 0; codes != nullptr && i < kWeights; ++i) codes[i] = select(none, lowest, codes[i]);
  return select(none, F(0.0F), scale);
}

/// One pass of `descended_fit`, where `active` is not 0: each code in turn moves to where it is best beside
/// the others. Returns 1 where any moved, else 0.
template <int kWeights, int kLevels, class F>
QAT_HD F descend(const F* x, F active, F* codes, CodeSums<F>* sums) {
  F moved = 0.0F;
  for (int i = 0; i < kWeights; ++i) {
    const F weight = x[i] * x[i];
    const F xl = sums->xl - weight * x[i] * codes[i];
    const F l2 = sums->l2 - weight * codes[i] * codes[i];
    const F code = ggml_code(x[i] * l2 / xl, -kLevels, kLevels - 1);
    const F new_xl = xl + weight * x[i] * code;
    const F new_l2 = l2 + weight * code * code;
    const auto better = (active > 0.0F) & (xl > 0.0F) & (code != codes[i]) & (new_l2 > 0.0F) &
                        (new_xl * new_xl * sums->l2 > sums->xl * sums->xl * new_l2);
    codes[i] = select(better, code, codes[i]);
    sums->xl = select(better, new_xl, sums->xl);
    sums->l2 = select(better, new_l2, sums->l2);
    moved = select(better, F(1.0F), moved);
  }
  return moved;
}

/// make_q3_quants with its descent of at most five passes. x: F[kWeights] -> scale, of either sign.
template <int kWeights, int kLevels, class F>
QAT_HD F descended_fit(const F* x, F* codes) {
  const Largest<F> largest = first_largest(x, kWeights);
  const auto none = largest.size < kNoScale;
  const F inverse = F(static_cast<float>(-kLevels)) / largest.signed_value;
  CodeSums<F> sums = symmetric_candidate<kWeights, kLevels>(x, inverse, codes);
  F active = 1.0F;
  for (int pass = 0; pass < 5; ++pass) active = descend<kWeights, kLevels>(x, active, codes, &sums);
  const F lowest = static_cast<float>(-kLevels);
  for (int i = 0; i < kWeights; ++i) codes[i] = select(none, lowest, codes[i]);
  const F scale = select(sums.l2 > 0.0F, sums.xl / sums.l2, F(0.0F));
  return select(none, F(0.0F), scale);
}

}  // namespace qat::grid
