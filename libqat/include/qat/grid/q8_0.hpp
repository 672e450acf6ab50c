#pragma once

// q8_0 (ggml): 32 weights share one scale d; w_hat = code * f16(d).
// Rule: d = max|w| / 127, code = roundf(w * (1/d)), ties away from zero; codes picked with the unrounded d.
// The rule itself gives -127..127; the file can also hold -128, so that is a legal code here.
// (ggml/src/ggml-quants.c, quantize_row_q8_0_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q8_0 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}};
  static constexpr Info kInfo{"q8_0", 8, 32, -128, 127, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = absolute_maximum(w, n) / 127.0F; }

  static QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) {
    add_largest_gradient(w, n, 127.0F, grad_s[0], grad_w);
  }

  static QAT_HD void search(const float* w, int64_t n, float* s) { search_scale(Q8_0{}, w, n, s); }

  static QAT_HD Status store(const float* s, float* stored) { return store_f16(s[0], stored); }

  /// Prepared once per block. An overflowing 1/d gives code 0 for every weight, as ggml's does (see Q4_0).
  struct Encoder {
    float inverse;
  };

  static QAT_HD Encoder encoder(const float* s) {
    const float inverse = ggml_inverse(s[0]);
    return {is_finite(inverse) ? inverse : 0.0F};
  }

  static QAT_HD int encode(float w, const Encoder& e) {
    return round_half_away(clamp(w * e.inverse, -128.0F, 127.0F));
  }

  static QAT_HD float decode(int code, const float* stored) { return static_cast<float>(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return inside(w * e.inverse, kInfo.code_min, kInfo.code_max);
  }

  /// Bytes: d f16 | 32 codes, int8.
  static constexpr int64_t kBlockBytes = 34;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    put_f16(stored[0], bytes);
    memcpy(bytes + 2, codes, 32);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    stored[0] = get_f16(bytes);
    memcpy(codes, bytes + 2, 32);
  }
};

}  // namespace qat::grid
