#pragma once

// q2_0 (ggml): 64 weights share one scale d; w_hat = code * f16(d), codes -1..2.
// Rule: d = max|w|, code = roundf(w * (1/d)), ties away from zero; codes picked with the unrounded d. The
// rule itself gives -1..1; the file also holds 2, so that is a legal code here, and a negative d
// (levels 1..-2) is legal too. (ggml/src/ggml-quants.c, quantize_row_q2_0_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q2_0 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}};
  static constexpr Info kInfo{"q2_0", 2, 64, -1, 2, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = absolute_maximum(w, n); }

  static QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) {
    add_largest_gradient(w, n, 1.0F, grad_s[0], grad_w);
  }

  static QAT_HD void search(const float* w, int64_t n, float* s) { search_scale(Q2_0{}, w, n, s); }

  static QAT_HD Status store(const float* s, float* stored) { return store_f16(s[0], stored); }

  /// Prepared once per block. An overflowing 1/d gives raw code 0 for every weight, as ggml's does (see
  /// Q4_0).
  struct Encoder {
    float inverse;
    float shift;
  };

  static QAT_HD Encoder encoder(const float* s) {
    const float inverse = ggml_inverse(s[0]);
    return is_finite(inverse) ? Encoder{inverse, 0.0F} : Encoder{0.0F, -1.0F};
  }

  static QAT_HD int encode(float w, const Encoder& e) {
    return round_half_away(clamp(w * e.inverse + e.shift, -1.0F, 2.0F));
  }

  static QAT_HD float decode(int code, const float* stored) { return static_cast<float>(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return inside(w * e.inverse, kInfo.code_min, kInfo.code_max);
  }

  /// Bytes: d f16 | 16 bytes, byte j = elements 4j to 4j + 3, low bits first, each code + 1.
  static constexpr int64_t kBlockBytes = 18;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    put_f16(stored[0], bytes);
    for (int j = 0; j < 16; ++j) bytes[2 + j] = pack_two_bits(codes + 4 * j, 1, kInfo.code_min);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    stored[0] = get_f16(bytes);
    for (int j = 0; j < 16; ++j) unpack_two_bits(bytes[2 + j], codes + 4 * j, 1, kInfo.code_min);
  }
};

}  // namespace qat::grid
