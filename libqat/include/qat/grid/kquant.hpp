#pragma once

// What ggml's K-quants share: blocks of 256 weights in sub-blocks of 16 or 32. A block stores d (and dmin) in
// fp16, a sub-block a small integer times d (and one times dmin).
//
//     with minima (q2_k, q4_k, q5_k):   w_hat = (d * sub_scale) * code - dmin * sub_min
//     without (q3_k, q6_k):             w_hat = (d * sub_scale) * code
//
// ggml picks the codes with the *stored* d and dmin. Where d * sub_scale is 0 the codes say nothing (but for
// the sign of a zero) and ggml leaves those of its search; so does `encode_block`, by searching again. More
// than 2^22 steps away from code 0, ggml's rounding no longer saturates but returns either end; so does ours.

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/kquant_improve.hpp"
#include "qat/grid/kquant_search.hpp"

namespace qat::grid {

/// Weights in a block of every K-quant (ggml's QK_K).
inline constexpr int kSuperBlock = 256;

/// An integer parameter: s rounded half to even and held in [low, high]; kOverflow for an infinity.
QAT_HD Status store_integer(float s, int low, int high, float* stored) {
  *stored = static_cast<float>(round_half_even(clamp(s, static_cast<float>(low), static_cast<float>(high))));
  if (s != s) return Status::kNotFinite;
  return is_finite(s) ? Status::kOk : Status::kOverflow;
}

/// Codes as the searches leave them, to the type of `Grid::encode`.
QAT_HD void put_codes(const float* from, int n, int8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = static_cast<int8_t>(from[i]);
}

/// 256 codes of two bits -> bytes[64]: byte 32 h + l holds elements 128 h + l, + 32, + 64, + 96, low bits
/// first.
QAT_HD void pack_quarters(const int8_t* codes, uint8_t* bytes) {
  for (int i = 0; i < kSuperBlock / 4; ++i) bytes[i] = pack_two_bits(codes + i / 32 * 128 + i % 32, 32, 0);
}

/// The reverse of `pack_quarters`.
QAT_HD void unpack_quarters(const uint8_t* bytes, int8_t* codes) {
  for (int i = 0; i < kSuperBlock / 4; ++i) unpack_two_bits(bytes[i], codes + i / 32 * 128 + i % 32, 32, 0);
}

/// The codec of a K-quant with minima. Rule: kWeights (of a sub-block), kCodeMax, kScaleMax (of sub-scales
/// and sub-minima), what `affine_fit` needs, and `combine(scales, minimums, s)`, ggml's way to two levels. s:
/// d, dmin, sub-scales, sub-minima.
template <class Rule>
struct AffineKQuant {
  using SubRule = Rule;
  static constexpr int kWeights = Rule::kWeights;
  static constexpr int kSubBlocks = kSuperBlock / kWeights;
  static constexpr int kParams = 2 + 2 * kSubBlocks;

  /// d * sub_scale and dmin * sub_min, exact products.
  struct Step {
    float scale;
    float minimum;
  };

  static QAT_HD Step step(const float* stored, int sub) {
    return {stored[0] * stored[2 + sub], stored[1] * stored[2 + kSubBlocks + sub]};
  }

  static QAT_HD void choose(const float* w, int64_t, float* s) { choose_by<Rule, float>(w, s); }

  static QAT_HD void search(const float* w, int64_t, float* s) { search_by<float>(w, s); }

  /// `choose` by the weights and candidates of that rule, with an F for the sub-blocks.
  template <class Candidates, class F>
  static QAT_HD void choose_by(const float* w, float* s) {
    float scales[kSubBlocks];
    float minimums[kSubBlocks];
    for (int sub = 0; sub < kSubBlocks; sub += kLanes<F>) {
      F x[kWeights];
      load_sub_blocks<kWeights>(w + sub * kWeights, x);
      const AffineFit<F> fit = affine_fit<Candidates, F>(x, nullptr);
      put_lanes(fit.scale, scales + sub);
      put_lanes(fit.minimum, minimums + sub);
    }
    Rule::combine(scales, minimums, s);
  }

  template <class F>
  static QAT_HD void search_by(const float* w, float* s) {
    choose_by<Rule, F>(w, s);
    float start[kParams];
    if (store(s, start) != Status::kOk) return;
    double least = stored_error<F>(w, start);
    improve<AffineKQuant, F>(w, start, &least, s);
    if constexpr (requires { typename Rule::SecondStart; }) {
      choose_by<typename Rule::SecondStart, F>(w, start);
      if (store(start, start) == Status::kOk) improve<AffineKQuant, F>(w, start, &least, s);
    }
  }

  /// The squared error of the block under stored scales.
  template <class F>
  static QAT_HD double stored_error(const float* w, const float* stored) {
    SubBlockSums sums;
    for (int sub = 0; sub < kSubBlocks; sub += kLanes<F>) {
      F x[kWeights];
      F scale;
      F minimum;
      load_sub_blocks<kWeights>(w + sub * kWeights, x);
      gather_lanes(stored + 2 + sub, 1, &scale);
      gather_lanes(stored + 2 + kSubBlocks + sub, 1, &minimum);
      square_error<kWeights, 0, Rule::kCodeMax>(x, F(stored[0]) * scale, F(stored[1]) * minimum, sub, &sums);
    }
    return sums.total_error(kSubBlocks);
  }

  template <class F>
  static QAT_HD void settle(const float* w, float* stored, SubBlockSums* sums) {
    settle_affine<AffineKQuant, F>(w, stored, sums);
  }

  static QAT_HD bool refit(const SubBlockSums& sums, float* stored) {
    return refit_affine<AffineKQuant>(sums, stored);
  }

  static QAT_HD Status store(const float* s, float* stored) {
    const Status scale = store_f16(s[0], stored);
    Status status = worse(scale, store_f16(s[1], stored + 1));
    for (int i = 2; i < kParams; ++i) {
      status = worse(status, store_integer(s[i], 0, Rule::kScaleMax, stored + i));
    }
    return status;
  }

  static QAT_HD void encode_block(const float* w, int64_t, const float* s, int8_t* codes) {
    float stored[kParams];
    store(s, stored);
    for (int sub = 0; sub < kSubBlocks; ++sub, w += kWeights, codes += kWeights) {
      const Step by = step(stored, sub);
      if (by.scale == 0.0F) {
        float found[kWeights];
        affine_fit<Rule, float>(w, found);
        put_codes(found, kWeights, codes);
        continue;
      }
      for (int i = 0; i < kWeights; ++i) {
        codes[i] = static_cast<int8_t>(ggml_code((w[i] + by.minimum) / by.scale, 0, Rule::kCodeMax));
      }
    }
  }

  static QAT_HD void decode_block(const int8_t* codes, int64_t, const float* stored, float* w_hat) {
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const Step by = step(stored, sub);
      for (int i = sub * kWeights; i < (sub + 1) * kWeights; ++i) {
        w_hat[i] = by.scale * static_cast<float>(codes[i]) - by.minimum;
      }
    }
  }

  static QAT_HD void in_range_block(const float* w, int64_t, const float* s, uint8_t* mask) {
    float stored[kParams];
    store(s, stored);
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const Step by = step(stored, sub);
      for (int i = sub * kWeights; i < (sub + 1) * kWeights; ++i) {
        mask[i] = by.scale == 0.0F || inside((w[i] + by.minimum) / by.scale, 0, Rule::kCodeMax) ? 1 : 0;
      }
    }
  }
};

/// The codec of a K-quant without minima. Rule: kLevels (codes are -kLevels..kLevels - 1), kScaleMin,
/// kScaleMax (of sub-scales), `fit(x, codes)` for a sub-block of 16 weights, `combine(scales, s)`.
/// s: d, sub-scales.
template <class Rule>
struct SymmetricKQuant {
  using SubRule = Rule;
  static constexpr int kWeights = 16;
  static constexpr int kSubBlocks = kSuperBlock / kWeights;
  static constexpr int kParams = 1 + kSubBlocks;

  /// d * sub_scale, an exact product.
  static QAT_HD float step(const float* stored, int sub) { return stored[0] * stored[1 + sub]; }

  static QAT_HD void choose(const float* w, int64_t, float* s) { choose_by<float>(w, s); }

  static QAT_HD void search(const float* w, int64_t, float* s) { search_by<float>(w, s); }

  /// `choose` with an F for the sub-blocks.
  template <class F>
  static QAT_HD void choose_by(const float* w, float* s) {
    float scales[kSubBlocks];
    for (int sub = 0; sub < kSubBlocks; sub += kLanes<F>) {
      F x[kWeights];
      F codes[kWeights];
      load_sub_blocks<kWeights>(w + sub * kWeights, x);
      put_lanes(Rule::fit(x, codes), scales + sub);
    }
    combine(scales, s);
  }

  template <class F>
  static QAT_HD void search_by(const float* w, float* s) {
    choose_by<F>(w, s);
    float start[kParams];
    if (store(s, start) != Status::kOk) return;
    double least = stored_error<F>(w, start);
    improve<SymmetricKQuant, F>(w, start, &least, s);
  }

  /// The squared error of the block under stored scales.
  template <class F>
  static QAT_HD double stored_error(const float* w, const float* stored) {
    SubBlockSums sums;
    for (int sub = 0; sub < kSubBlocks; sub += kLanes<F>) {
      F x[kWeights];
      F scale;
      load_sub_blocks<kWeights>(w + sub * kWeights, x);
      gather_lanes(stored + 1 + sub, 1, &scale);
      square_error<kWeights, -Rule::kLevels, Rule::kLevels - 1>(x, F(stored[0]) * scale, F(0.0F), sub, &sums);
    }
    return sums.total_error(kSubBlocks);
  }

  template <class F>
  static QAT_HD void settle(const float* w, float* stored, SubBlockSums* sums) {
    settle_symmetric<SymmetricKQuant, F>(w, stored, sums);
  }

  static QAT_HD bool refit(const SubBlockSums& sums, float* stored) {
    return refit_symmetric<SymmetricKQuant>(sums, stored);
  }

  /// Where a search overflows float32, d is infinite, which `store` refuses.
  static QAT_HD void combine(const float* scales, float* s) {
    if (all_finite(scales, kSubBlocks)) return Rule::combine(scales, s);
    s[0] = float_of(kInfinityBits);
    for (int sub = 0; sub < kSubBlocks; ++sub) s[1 + sub] = 0.0F;
  }

  static QAT_HD Status store(const float* s, float* stored) {
    Status status = store_f16(s[0], stored);
    for (int i = 1; i < kParams; ++i) {
      status = worse(status, store_integer(s[i], Rule::kScaleMin, Rule::kScaleMax, stored + i));
    }
    return status;
  }

  static QAT_HD void encode_block(const float* w, int64_t, const float* s, int8_t* codes) {
    float stored[kParams];
    store(s, stored);
    for (int sub = 0; sub < kSubBlocks; ++sub, w += kWeights, codes += kWeights) {
      const float scale = step(stored, sub);
      if (scale == 0.0F) {
        float found[kWeights];
        Rule::fit(w, found);
        put_codes(found, kWeights, codes);
        continue;
      }
      for (int i = 0; i < kWeights; ++i) {
        codes[i] = static_cast<int8_t>(ggml_code(w[i] / scale, -Rule::kLevels, Rule::kLevels - 1));
      }
    }
  }

  static QAT_HD void decode_block(const int8_t* codes, int64_t, const float* stored, float* w_hat) {
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const float scale = step(stored, sub);
      for (int i = sub * kWeights; i < (sub + 1) * kWeights; ++i) {
        w_hat[i] = scale * static_cast<float>(codes[i]);
      }
    }
  }

  static QAT_HD void in_range_block(const float* w, int64_t, const float* s, uint8_t* mask) {
    float stored[kParams];
    store(s, stored);
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const float scale = step(stored, sub);
      for (int i = sub * kWeights; i < (sub + 1) * kWeights; ++i) {
        mask[i] = scale == 0.0F || inside(w[i] / scale, -Rule::kLevels, Rule::kLevels - 1) ? 1 : 0;
      }
    }
  }
};

}  // namespace qat::grid
