#pragma once

// A codec with the scales of one block, as formulas on one weight or on several side by side (see lanes.hpp):
// what vectorised kernels and gradients are computed with. `level` is what a code stands for in steps of the
// scale, and `position` where the weight lies among the levels before it is rounded:
//
//     w_hat = level * s' (+ offset),    position = (w (- offset)) / s,    e = level - position
//
// Every Steps<Codec, F> has, for the codes that `Codec::encode` picks with scales s, `held` of which the file
// has stored:
//
//     F position(F w) | F level(F w, F position) | F weight(F level): w_hat
//     inside(F w, F position): as `Codec::in_range` | F spacing(F position): between the levels around it
//     put(BlockSums, float* grad_s): sums of a block's gradients -> those of its scales

#include "qat/grid/int_asymmetric.hpp"
#include "qat/grid/int_symmetric.hpp"
#include "qat/grid/lanes.hpp"
#include "qat/grid/mlx_affine.hpp"
#include "qat/grid/mxfp4.hpp"
#include "qat/grid/nvfp4.hpp"
#include "qat/grid/offset_block.hpp"
#include "qat/grid/q1_0.hpp"
#include "qat/grid/q2_0.hpp"
#include "qat/grid/q8_0.hpp"
#include "qat/grid/signed_block.hpp"
#include "qat/grid/tq1_0.hpp"
#include "qat/grid/tq2_0.hpp"

namespace qat::grid {

/// Sums over the weights of a block, g = dL/dw_hat.
struct BlockSums {
  float scale;   ///< of g * dw_hat/ds' of the scale, by LSQ's rule
  float offset;  ///< of g * dw_hat/d offset: g of the weights that are not inside
};

/// `inside` of device.hpp for an F.
template <class F>
QAT_HD auto within(F value, float low, float high) {
  constexpr float kWiden = 1.0F + 0x1p-20F;
  return (value >= F(low * kWiden)) & (value <= F(high * kWiden));
}

/// What grids share whose levels are integers.
template <class F>
struct IntegerSteps {
  static QAT_HD F spacing(F) { return 1.0F; }
  /// dw_hat/ds' of a weight.
  template <class Mask>
  static QAT_HD F slope(Mask inside, F level, F position) {
    return select(inside, level - position, level);
  }
  static QAT_HD void put(const BlockSums& sums, float* grad_s) { grad_s[0] = sums.scale; }
};

template <class Codec, class F>
struct Steps;

/// q8_0, q2_0, tq1_0 and tq2_0: ties go away from zero.
template <class Codec, class F>
struct AwaySteps : IntegerSteps<F> {
  static constexpr auto kLow = static_cast<float>(Codec::kInfo.code_min);
  static constexpr auto kHigh = static_cast<float>(Codec::kInfo.code_max);
  F inverse, shift, stored;

  QAT_HD AwaySteps(const Codec&, const float* s, const float* held) : shift(0.0F), stored(held[0]) {
    const typename Codec::Encoder e = Codec::encoder(s);
    inverse = e.inverse;
    if constexpr (requires { e.shift; }) shift = e.shift;
  }

  QAT_HD F position(F w) const { return w * inverse; }
  QAT_HD F level(F, F position) const { return nearest_away(limited(position + shift, kLow, kHigh)); }
  QAT_HD F weight(F level) const { return level * stored; }
  QAT_HD auto inside(F, F position) const { return within(position, kLow, kHigh); }
};

template <class F>
struct Steps<Q8_0, F> : AwaySteps<Q8_0, F> {
  using AwaySteps<Q8_0, F>::AwaySteps;
};
template <class F>
struct Steps<Q2_0, F> : AwaySteps<Q2_0, F> {
  using AwaySteps<Q2_0, F>::AwaySteps;
};
template <class F>
struct Steps<TQ1_0, F> : AwaySteps<TQ1_0, F> {
  using AwaySteps<TQ1_0, F>::AwaySteps;
};
template <class F>
struct Steps<TQ2_0, F> : AwaySteps<TQ2_0, F> {
  using AwaySteps<TQ2_0, F>::AwaySteps;
};

/// q4_0 and q5_0: codes shifted to begin at 0, and truncated.
template <int kBits, class F>
struct Steps<SignedBlock<kBits>, F> : IntegerSteps<F> {
  using Codec = SignedBlock<kBits>;
  static constexpr auto kHalf = static_cast<float>(Codec::kHalf);
  F inverse, shift, stored;

  QAT_HD Steps(const Codec&, const float* s, const float* held) : stored(held[0]) {
    const typename Codec::Encoder e = Codec::encoder(s);
    inverse = e.inverse;
    shift = e.shift;
  }

  QAT_HD F position(F w) const { return w * inverse; }
  QAT_HD F level(F, F position) const {
    return truncated(limited(position + shift, 0.0F, 2.0F * kHalf - 1.0F)) - F(kHalf);
  }
  QAT_HD F weight(F level) const { return level * stored; }
  QAT_HD auto inside(F, F position) const { return within(position, -kHalf, kHalf - 1.0F); }
};

/// q4_1 and q5_1.
template <int kBits, class F>
struct Steps<OffsetBlock<kBits>, F> : IntegerSteps<F> {
  using Codec = OffsetBlock<kBits>;
  static constexpr auto kMost = static_cast<float>(Codec::kCodeMax);
  F inverse, minimum, stored, offset;

  QAT_HD Steps(const Codec&, const float* s, const float* held) : stored(held[0]), offset(held[1]) {
    const typename Codec::Encoder e = Codec::encoder(s);
    inverse = e.inverse;
    minimum = e.minimum;
  }

  QAT_HD F position(F w) const { return (w - minimum) * inverse; }
  QAT_HD F level(F, F position) const { return truncated(limited(position + F(0.5F), 0.0F, kMost)); }
  QAT_HD F weight(F level) const { return level * stored + offset; }
  QAT_HD auto inside(F, F position) const { return within(position, 0.0F, kMost); }
  static QAT_HD void put(const BlockSums& sums, float* grad_s) {
    grad_s[0] = sums.scale;
    grad_s[1] = sums.offset;
  }
};

/// q1_0: the levels -1 and 1 are two steps apart. Its scale has no rounding error to learn from (a sign has
/// no clipping border): dw_hat/ds' is the sign itself (BiT, arXiv:2205.13016).
template <class F>
struct Steps<Q1_0, F> : IntegerSteps<F> {
  F sign, limit, inverse, stored;

  QAT_HD Steps(const Q1_0&, const float* s, const float* held) : stored(held[0]) {
    const Q1_0::Encoder e = Q1_0::encoder(s);
    sign = e.sign;
    limit = e.limit * (1.0F + 0x1p-20F);
    inverse = ggml_inverse(s[0]);
  }

  QAT_HD F position(F w) const { return w * inverse; }
  QAT_HD F level(F w, F) const { return select(w * sign >= F(0.0F), F(1.0F), F(-1.0F)); }
  QAT_HD F weight(F level) const { return level * stored; }
  QAT_HD auto inside(F w, F) const { return magnitude(w) <= limit; }
  static QAT_HD F spacing(F) { return 2.0F; }
  template <class Mask>
  static QAT_HD F slope(Mask, F level, F) {
    return level;
  }
};

template <class F>
struct Steps<IntSymmetric, F> : IntegerSteps<F> {
  F divisor, unstored, stored;
  float low, high;
  DType dequant;

  QAT_HD Steps(const IntSymmetric& codec, const float* s, const float* held)
      : stored(held[0]), low(codec.low), high(codec.high), dequant(codec.dequant) {
    const IntSymmetric::Encoder e = codec.encoder(s);
    divisor = e.divisor;
    unstored = e.unstored;
  }

  QAT_HD F position(F w) const { return w / divisor; }
  QAT_HD F level(F, F position) const { return nearest_even(limited(position, low, high)); }
  QAT_HD F weight(F level) const { return round_value(dequant, level * stored); }
  QAT_HD auto inside(F w, F) const { return within(w / unstored, low, high); }
};

/// w_hat = (code - z) * s': the level is that difference.
template <class F>
struct Steps<IntAsymmetric, F> : IntegerSteps<F> {
  F divisor, unstored, zero, stored;
  float low, high, offset_slope;
  DType dequant;

  QAT_HD Steps(const IntAsymmetric& codec, const float* s, const float* held)
      : zero(held[1]),
        stored(held[0]),
        low(codec.low),
        high(codec.high),
        offset_slope(-held[0]),
        dequant(codec.dequant) {
    const IntAsymmetric::Encoder e = codec.encoder(s);
    divisor = e.divisor;
    unstored = e.unstored;
  }

  QAT_HD F position(F w) const { return w / divisor; }
  QAT_HD F level(F, F position) const { return nearest_even(limited(position + zero, low, high)) - zero; }
  QAT_HD F weight(F level) const { return round_value(dequant, level * stored); }
  QAT_HD auto inside(F w, F) const {
    const F place = w / unstored + zero;
    return (place >= F(low - IntAsymmetric::kHalf)) & (place <= F(high + IntAsymmetric::kHalf));
  }
  QAT_HD void put(const BlockSums& sums, float* grad_s) const {
    grad_s[0] = sums.scale;
    grad_s[1] = offset_slope * sums.offset;
  }
};

template <class F>
struct Steps<MlxAffine, F> : IntegerSteps<F> {
  F divisor, bias, stored, offset;
  float levels;
  DType dtype;

  QAT_HD Steps(const MlxAffine& codec, const float* s, const float* held)
      : stored(held[0]), offset(held[1]), levels(codec.levels), dtype(codec.dtype) {
    const MlxAffine::Encoder e = codec.encoder(s);
    divisor = e.scale;
    bias = e.bias;
  }

  QAT_HD F position(F w) const { return (w - bias) / divisor; }
  QAT_HD F level(F, F position) const { return nearest_even(limited(position, 0.0F, levels)); }
  QAT_HD F weight(F level) const { return round_value(dtype, round_value(dtype, level * stored) + offset); }
  QAT_HD auto inside(F, F position) const { return within(position, 0.0F, levels); }
  static QAT_HD void put(const BlockSums& sums, float* grad_s) {
    grad_s[0] = sums.scale;
    grad_s[1] = sums.offset;
  }
};

/// mxfp4 and nvfp4: levels of e2m1, which are 0.5, 1 and 2 apart.
template <class Codec, class F>
struct E2M1Steps : IntegerSteps<F> {
  F scale, stored;

  QAT_HD E2M1Steps(const Codec&, const float* s, const float* held)
      : scale(Codec::encoder(s).scale), stored(held[0]) {}

  QAT_HD F position(F w) const { return w / scale; }
  QAT_HD F level(F w, F) const { return e2m1_level(w, scale); }
  QAT_HD F weight(F level) const { return level * stored; }
  QAT_HD auto inside(F w, F) const { return magnitude(w) <= F(kE2M1Max * (1.0F + 0x1p-20F)) * scale; }
  static QAT_HD F spacing(F position) {
    const F size = magnitude(position);
    return select(size < F(2.0F), F(0.5F), select(size < F(4.0F), F(1.0F), F(2.0F)));
  }
};

template <class F>
struct Steps<Mxfp4, F> : E2M1Steps<Mxfp4, F> {
  using E2M1Steps<Mxfp4, F>::E2M1Steps;
};
template <class F>
struct Steps<Nvfp4, F> : E2M1Steps<Nvfp4, F> {
  using E2M1Steps<Nvfp4, F>::E2M1Steps;
};

}  // namespace qat::grid
