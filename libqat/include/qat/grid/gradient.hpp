#pragma once

// The gradients of fake-quantization with scales that are held still or learned, written once for one weight
// and for eight side by side (see lanes.hpp): sums have eight lanes in both, so they have the same bits.
//
// With level, position and e = level - position of steps.hpp, and g = dL/dw_hat:
//   dL/dw  = g * factor, see `Estimate`
//   dL/ds  = sum of g * (inside ? e : level)     (LSQ, arXiv:1902.08153: the codes pass straight through)
//   offset   sum of g * (inside ? 0 : 1)         (LSQ+, arXiv:2004.09576)

#include "qat/core/scheme.hpp"
#include "qat/grid/kquant_steps.hpp"
#include "qat/grid/lanes.hpp"
#include "qat/grid/steps.hpp"

namespace qat::grid {

/// What the gradients of one row are made of. grad_w may be `g`; null: not wanted.
struct BackwardRow {
  const float* w;
  const float* g;
  float* grad_w;
  float trust;  ///< EstimatorKind::kTrustMask: the largest error that passes

  /// The same, from weight i on.
  QAT_HD BackwardRow from(int64_t i) const {
    return {w + i, g + i, grad_w == nullptr ? nullptr : grad_w + i, trust};
  }
};

/// The MSE-optimal range of a normal distribution with that many levels, in standard deviations. (QuEST,
/// arXiv:2502.05003)
QAT_HD float trust_range(int levels) {
  if (levels <= 2) return 0.7979F;
  if (levels <= 3) return 1.2240F;
  if (levels <= 4) return 1.4935F;
  if (levels <= 8) return 2.0511F;
  if (levels <= 16) return 2.5139F;
  if (levels <= 32) return 2.9161F;
  if (levels <= 64) return 3.2766F;
  if (levels <= 128) return 3.6010F;
  return 3.8849F;
}

/// t = c * RMS(w) / (levels - 1), half a step of that range. w: float32[n].
QAT_HD float trust_threshold(const Info& info, const float* w, int64_t n) {
  double squares[8] = {};
  for (int64_t i = 0; i < n; ++i) squares[i & 7] += static_cast<double>(w[i]) * static_cast<double>(w[i]);
  double total = 0.0;
  for (const double square : squares) total += square;
  const auto rms = static_cast<float>(sqrt(total / static_cast<double>(n)));
  const int levels = info.code_max - info.code_min + 1;
  return trust_range(levels) * rms / static_cast<float>(levels - 1);
}

/// cos(pi e) for |e| <= 1/2, by its series: the next term is below 1e-8.
template <class F>
QAT_HD F cosine_of_pi(F e) {
  constexpr float kTerms[] = {
      1.92957431e-3F, -2.58068913e-2F, 2.35330630e-1F, -1.33526277F, 4.05871213F, -4.93480220F, 1.0F};
  const F square = e * e;
  F sum = kTerms[0];
  for (int i = 1; i < 7; ++i) sum = sum * square + F(kTerms[i]);
  return sum;
}

/// StableQAT's (1 - S) / (1 + S), S = sqrt(2) pi 0.21 cos(pi e); e in steps, held in [-1/2, 1/2]. The paper's
/// cos(pi (v + r(v))) is this one: v + r(v) is 2 r(v) - e, and r(v) an integer. (arXiv:2601.19320)
template <class F>
QAT_HD F stable_factor(F e) {
  constexpr float kAmplitude = 0.93300542F;
  const F swing = F(kAmplitude) * cosine_of_pi(limited(e, -0.5F, 0.5F));
  return (F(1.0F) - swing) / (F(1.0F) + swing);
}

/// grad_w of a weight.
template <EstimatorKind kKind, class F, class Steps, class Mask>
QAT_HD F passed(const Steps& steps, F w, F g, F position, F level, Mask inside, float trust) {
  if constexpr (kKind == EstimatorKind::kClippedSte) {
    return select(inside, g, F(0.0F));
  } else if constexpr (kKind == EstimatorKind::kTrustMask) {
    return select(magnitude(steps.weight(level) - w) <= F(trust), g, F(0.0F));
  } else if constexpr (kKind == EstimatorKind::kStableQat) {
    const F e = (level - position) / Steps::spacing(position);
    return select(inside, g * stable_factor(e), F(0.0F));
  } else {
    return g;
  }
}

/// Running sums, term i in lane i mod 8.
template <class F>
struct LaneSums {
  F scale[8 / kLanes<F>];
  F offset[8 / kLanes<F>];

  QAT_HD LaneSums() {
    for (int k = 0; k < 8 / kLanes<F>; ++k) scale[k] = offset[k] = 0.0F;
  }
  /// The same lanes one by one.
  QAT_HD LaneSums<float> apart() const {
    LaneSums<float> lanes;
    for (int k = 0; k < 8; k += kLanes<F>) {
      put_lanes(scale[k / kLanes<F>], lanes.scale + k);
      put_lanes(offset[k / kLanes<F>], lanes.offset + k);
    }
    return lanes;
  }
};

/// The lanes added pairwise: 4 apart, then 2, then 1.
QAT_HD float total_of_lanes(const float* lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/// The weights of an F: their gradients to grad_w, and to the sums.
template <EstimatorKind kKind, class F, class Steps>
QAT_HD void backward_lanes(const Steps& steps, const BackwardRow& row, int64_t i, LaneSums<F>& sums) {
  F w;
  F g;
  load_lanes(row.w + i, &w);
  load_lanes(row.g + i, &g);
  const F position = steps.position(w);
  const F level = steps.level(w, position);
  const auto inside = steps.inside(w, position);
  const int64_t lane = i % 8 / kLanes<F>;
  sums.scale[lane] = sums.scale[lane] + g * Steps::slope(inside, level, position);
  sums.offset[lane] = sums.offset[lane] + select(inside, F(0.0F), g);
  if (row.grad_w == nullptr) return;
  put_lanes(passed<kKind>(steps, w, g, position, level, inside, row.trust), row.grad_w + i);
}

/// n weights that share their scales; the sums of 256 at a time are added in double. Wide and Narrow: the
/// block's steps for an F and for a single weight.
template <EstimatorKind kKind, class F, class Wide, class Narrow>
QAT_HD BlockSums backward_block(const Wide& wide, const Narrow& narrow, const BackwardRow& row, int64_t n) {
  constexpr int64_t kChunk = 256;
  double scale = 0.0;
  double offset = 0.0;
  for (int64_t first = 0; first < n; first += kChunk) {
    const BackwardRow chunk = row.from(first);
    const int64_t count = n - first < kChunk ? n - first : kChunk;
    const int64_t whole = count - count % kLanes<F>;
    LaneSums<F> sums;
    for (int64_t i = 0; i < whole; i += 8) {
      for (int64_t k = 0; k < 8 && i + k < whole; k += kLanes<F>) {
        backward_lanes<kKind>(wide, chunk, i + k, sums);
      }
    }
    LaneSums<float> lanes = sums.apart();
    for (int64_t i = whole; i < count; ++i) backward_lanes<kKind>(narrow, chunk, i, lanes);
    scale += static_cast<double>(total_of_lanes(lanes.scale));
    offset += static_cast<double>(total_of_lanes(lanes.offset));
  }
  return {static_cast<float>(scale), static_cast<float>(offset)};
}

/// The gradients of one block of n weights, with scales s of which `stored` is in the file. grad_s:
/// float32[P] or null.
template <EstimatorKind kKind, class F, class Codec>
QAT_HD void backward_scales(const Codec& codec, const float* s, const float* stored, const BackwardRow& row,
                            int64_t n, float* grad_s) {
  if constexpr (requires { Codec::kSubBlocks; }) {
    using Levels = LevelsOf<Codec>;
    for (int i = 0; grad_s != nullptr && i < Codec::kParams; ++i) grad_s[i] = 0.0F;
    for (int sub = 0; sub < Codec::kSubBlocks; ++sub) {
      const BlockSums sums = backward_block<kKind, F>(Levels::template steps<F>(stored, sub),
                                                      Levels::template steps<float>(stored, sub),
                                                      row.from(sub * Codec::kWeights), Codec::kWeights);
      if (grad_s != nullptr) Levels::add(sums, stored, sub, grad_s);
    }
  } else {
    const Steps<Codec, float> narrow(codec, s, stored);
    const BlockSums sums = backward_block<kKind, F>(Steps<Codec, F>(codec, s, stored), narrow, row, n);
    if (grad_s != nullptr) narrow.put(sums, grad_s);
  }
}

/// Grid::backward of a row whose w is finite and whose s has no NaN. Store: codec.store, or its faster equal.
template <EstimatorKind kKind, class F, class Codec, class Store>
QAT_HD Status backward_row(const Codec& codec, int64_t block, int params, int64_t n, const float* s,
                           const BackwardRow& row, float* grad_s, Store store) {
  Status worst = Status::kOk;
  float stored[kMaxParams];
  for (int64_t b = 0; b < n / block; ++b) {
    const float* scales = s + b * params;
    worst = worse(worst, store(codec, scales, stored));
    float* to = grad_s == nullptr ? nullptr : grad_s + b * params;
    backward_scales<kKind, F>(codec, scales, stored, row.from(b * block), block, to);
  }
  return worst;
}

/// The same, for an estimator that is known when it runs.
template <class F, class Codec, class Store>
QAT_HD Status backward_row(const Codec& codec, int64_t block, int params, EstimatorKind kind, int64_t n,
                           const float* s, BackwardRow row, float* grad_s, Store store) {
  switch (kind) {
    case EstimatorKind::kSte:
      return backward_row<EstimatorKind::kSte, F>(codec, block, params, n, s, row, grad_s, store);
    case EstimatorKind::kClippedSte:
      return backward_row<EstimatorKind::kClippedSte, F>(codec, block, params, n, s, row, grad_s, store);
    case EstimatorKind::kTrustMask:
      row.trust = trust_threshold(info_of(codec), row.w, n);
      return backward_row<EstimatorKind::kTrustMask, F>(codec, block, params, n, s, row, grad_s, store);
    case EstimatorKind::kStableQat:
      return backward_row<EstimatorKind::kStableQat, F>(codec, block, params, n, s, row, grad_s, store);
  }
  return Status::kOk;
}

}  // namespace qat::grid
