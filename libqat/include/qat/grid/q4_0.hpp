#pragma once

// q4_0 (ggml): 32 weights share one signed scale d; w_hat = code * f16(d), codes -8..7.
// Rule: d = m / -8 with m the first weight of the largest magnitude; code = trunc(w * (1/d) + 8.5) - 8, at
// most 7. Codes are picked with the unrounded d. (ggml/src/ggml-quants.c, quantize_row_q4_0_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q4_0 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}};
  static constexpr Info kInfo{"q4_0", 4, 32, -8, 7, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = first_of_largest(w, n) / -8.0F; }

  static QAT_HD void search(const float* w, int64_t n, float* s) { search_scale(Q4_0{}, w, n, s); }

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
    return is_finite(inverse) ? Encoder{inverse, 8.5F} : Encoder{0.0F, 0.5F};
  }

  static QAT_HD int encode(float w, const Encoder& e) {
    return static_cast<int>(clamp(w * e.inverse + e.shift, 0.0F, 15.0F)) - 8;
  }

  static QAT_HD float decode(int code, const float* stored) { return static_cast<float>(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return inside(w * e.inverse, kInfo.code_min, kInfo.code_max);
  }

  /// Bytes: d f16 | 16 bytes, byte j = element j (low nibble) and j + 16 (high), each code + 8.
  static constexpr int64_t kBlockBytes = 18;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    put_f16(stored[0], bytes);
    pack_nibbles(codes, kInfo.code_min, bytes + 2);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    stored[0] = get_f16(bytes);
    unpack_nibbles(bytes + 2, kInfo.code_min, codes);
  }
};

}  // namespace qat::grid
