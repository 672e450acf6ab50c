#pragma once

// q5_0 (ggml): 32 weights share one signed scale d; w_hat = code * f16(d), codes -16..15.
// Rule: d = m / -16 with m the first weight of the largest magnitude; code = trunc(w * (1/d) + 16.5) - 16, at
// most 15. Codes are picked with the unrounded d. (ggml/src/ggml-quants.c, quantize_row_q5_0_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q5_0 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}};
  static constexpr Info kInfo{"q5_0", 5, 32, -16, 15, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = first_of_largest(w, n) / -16.0F; }

  static QAT_HD void search(const float* w, int64_t n, float* s) { search_scale(Q5_0{}, w, n, s); }

  static QAT_HD Status store(const float* s, float* stored) { return store_f16(s[0], stored); }

  /// Prepared once per block. An overflowing 1/d gives raw code 0 for every weight, as ggml's does (see
  /// Q4_0).
  struct Encoder {
    float inverse;
    float shift;
  };

  static QAT_HD Encoder encoder(const float* s) {
    const float inverse = ggml_inverse(s[0]);
    return is_finite(inverse) ? Encoder{inverse, 16.5F} : Encoder{0.0F, 0.5F};
  }

  static QAT_HD int encode(float w, const Encoder& e) {
    return static_cast<int>(clamp(w * e.inverse + e.shift, 0.0F, 31.0F)) - 16;
  }

  static QAT_HD float decode(int code, const float* stored) { return static_cast<float>(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return inside(w * e.inverse, kInfo.code_min, kInfo.code_max);
  }

  /// Bytes: d f16 | u32, bit j = the fifth bit of element j | 16 bytes of the low four bits as in Q4_0; each
  /// code + 16.
  static constexpr int64_t kBlockBytes = 22;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    put_f16(stored[0], bytes);
    pack_five_bits(codes, kInfo.code_min, bytes + 2);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    stored[0] = get_f16(bytes);
    unpack_five_bits(bytes + 2, kInfo.code_min, codes);
  }
};

}  // namespace qat::grid
