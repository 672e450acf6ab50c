#pragma once

// q4_0 and q5_0 (ggml): 32 weights share one signed scale d; w_hat = code * f16(d), codes -8..7 (-16..15).
// Rule: d = m / -8 (-16) with m the first weight of the largest magnitude; code = trunc(w * (1/d) + 8.5) - 8
// (+ 16.5, - 16), at most 7 (15). Codes are picked with the unrounded d. (ggml/src/ggml-quants.c,
// quantize_row_q4_0_ref, quantize_row_q5_0_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

/// kBits: 4 or 5.
template <int kBits>
struct SignedBlock {
  static_assert(kBits == 4 || kBits == 5);
  static constexpr int kHalf = 1 << (kBits - 1);
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}};
  static constexpr Info kInfo{
      kBits == 4 ? "q4_0" : "q5_0", kBits, 32, -kHalf, kHalf - 1, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) {
    s[0] = first_of_largest(w, n) / static_cast<float>(-kHalf);
  }

  static QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) {
    grad_w[place_of_largest(w, n)] -= grad_s[0] / static_cast<float>(kHalf);
  }

  static QAT_HD void search(const float* w, int64_t n, float* s) { search_scale(SignedBlock{}, w, n, s); }

  static QAT_HD Status store(const float* s, float* stored) { return store_f16(s[0], stored); }

  /// Prepared once per block. Where 1/d overflows, ggml converts infinities and NaNs to integers, which
  /// yields a raw code of 0 on x86 for every weight: an inverse of 0 and a shift of 0.5 say the same without
  /// the overflow.
  struct Encoder {
    float inverse;
    float shift;
  };

  static QAT_HD Encoder encoder(const float* s) {
    const float inverse = ggml_inverse(s[0]);
    return is_finite(inverse) ? Encoder{inverse, static_cast<float>(kHalf) + 0.5F} : Encoder{0.0F, 0.5F};
  }

  static QAT_HD int encode(float w, const Encoder& e) {
    return static_cast<int>(clamp(w * e.inverse + e.shift, 0.0F, static_cast<float>(2 * kHalf - 1))) - kHalf;
  }

  static QAT_HD float decode(int code, const float* stored) { return static_cast<float>(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return inside(w * e.inverse, kInfo.code_min, kInfo.code_max);
  }

  /// Bytes: d f16 | the codes, each + 2^(b-1), as `pack_halves` lays them out.
  static constexpr int64_t kBlockBytes = 2 + 4 * kBits;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    put_f16(stored[0], bytes);
    pack_halves<kBits>(codes, kInfo.code_min, bytes + 2);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    stored[0] = get_f16(bytes);
    unpack_halves<kBits>(bytes + 2, kInfo.code_min, codes);
  }
};

// NOLINTBEGIN(readability-identifier-naming): ggml's own spelling.
/// Codes -8..7.
using Q4_0 = SignedBlock<4>;
/// Codes -16..15.
using Q5_0 = SignedBlock<5>;
// NOLINTEND(readability-identifier-naming)

}  // namespace qat::grid
