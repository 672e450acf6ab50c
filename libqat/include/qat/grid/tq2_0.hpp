#pragma once

// tq2_0 (ggml): 256 weights share one scale d; w_hat = code * f16(d), codes -1..2.
// Rule: d = max|w|, code = w * (1/d) rounded half away from zero; codes picked with the unrounded d. The rule
// itself gives -1..1 ("ternary"); the file also holds 2, which ggml decodes as 2 d, so that is a legal code
// here. (ggml/src/ggml-quants.c, quantize_row_tq2_0_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct TQ2_0 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}};
  static constexpr Info kInfo{"tq2_0", 2, 256, -1, 2, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = absolute_maximum(w, n); }

  static QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) {
    add_largest_gradient(w, n, 1.0F, grad_s[0], grad_w);
  }

  static QAT_HD void search(const float* w, int64_t n, float* s) { search_scale(TQ2_0{}, w, n, s); }

  static QAT_HD Status store(const float* s, float* stored) { return store_f16(s[0], stored); }

  /// Prepared once per block. Where 1/d overflows, ggml converts infinities and NaNs to 64-bit integers, of
  /// which x86 keeps low bits of 0: code 0 for every weight.
  struct Encoder {
    float inverse;
  };

  static QAT_HD Encoder encoder(const float* s) {
    const float inverse = ggml_inverse(s[0]);
    return {is_finite(inverse) ? inverse : 0.0F};
  }

  static QAT_HD int encode(float w, const Encoder& e) {
    return round_half_away(clamp(w * e.inverse, -1.0F, 2.0F));
  }

  static QAT_HD float decode(int code, const float* stored) { return static_cast<float>(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return inside(w * e.inverse, kInfo.code_min, kInfo.code_max);
  }

  /// Bytes: 64 bytes, byte m of half h (32 each) = elements 128 h + m, + 32, + 64, + 96, low bits first, each
  /// code + 1 | d f16.
  static constexpr int64_t kBlockBytes = 66;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    for (int j = 0; j < 64; ++j) bytes[j] = pack_two_bits(codes + first_of_byte(j), 32, kInfo.code_min);
    put_f16(stored[0], bytes + 64);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    for (int j = 0; j < 64; ++j) unpack_two_bits(bytes[j], codes + first_of_byte(j), 32, kInfo.code_min);
    stored[0] = get_f16(bytes + 64);
  }

  static constexpr QAT_HD int first_of_byte(int j) { return j / 32 * 128 + j % 32; }
};

}  // namespace qat::grid
