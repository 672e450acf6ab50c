#pragma once

// tq1_0 (ggml): 256 weights share one scale d; w_hat = code * f16(d), codes -1..1, five of them in a byte.
// Rule: d = max|w|, code = w * (1/d) rounded half away from zero; codes picked with the unrounded d.
// (ggml/src/ggml-quants.c, quantize_row_tq1_0_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search.hpp"
#include "qat/grid/tq2_0.hpp"

namespace qat::grid {

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct TQ1_0 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}};
  static constexpr Info kInfo{"tq1_0", 2, 256, -1, 1, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = absolute_maximum(w, n); }

  static QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) {
    add_largest_gradient(w, n, 1.0F, grad_s[0], grad_w);
  }

  static QAT_HD void search(const float* w, int64_t n, float* s) { search_scale(TQ1_0{}, w, n, s); }

  static QAT_HD Status store(const float* s, float* stored) { return store_f16(s[0], stored); }

  using Encoder = TQ2_0::Encoder;  // the same rounding of the same scale

  static QAT_HD Encoder encoder(const float* s) { return TQ2_0::encoder(s); }

  static QAT_HD int encode(float w, const Encoder& e) {
    return round_half_away(clamp(w * e.inverse, -1.0F, 1.0F));
  }

  static QAT_HD float decode(int code, const float* stored) { return static_cast<float>(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return inside(w * e.inverse, kInfo.code_min, kInfo.code_max);
  }

  /// Bytes: 32 bytes of elements 0 to 159, byte m = elements m, m + 32, ... m + 128 | 16 bytes of elements
  /// 160 to 239, 16 apart | 4 bytes of elements 240 to 255, four of them, 4 apart | d f16.
  static constexpr int64_t kBlockBytes = 54;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    for (int m = 0; m < 32; ++m) bytes[m] = pack_trits(codes + m, 32, 5);
    for (int m = 0; m < 16; ++m) bytes[32 + m] = pack_trits(codes + 160 + m, 16, 5);
    for (int m = 0; m < 4; ++m) bytes[48 + m] = pack_trits(codes + 240 + m, 4, 4);
    put_f16(stored[0], bytes + 52);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    for (int m = 0; m < 32; ++m) unpack_trits(bytes[m], codes + m, 32, 5);
    for (int m = 0; m < 16; ++m) unpack_trits(bytes[32 + m], codes + 160 + m, 16, 5);
    for (int m = 0; m < 4; ++m) unpack_trits(bytes[48 + m], codes + 240 + m, 4, 4);
    stored[0] = get_f16(bytes + 52);
  }

 private:
  /// Codes + 1 as the digits of a number v in base 3, the first the highest and missing ones 0; the byte is
  /// ceil(v * 256 / 243), so that the digits come out again as the carries of products with 3.
  static QAT_HD uint8_t pack_trits(const int8_t* codes, int step, int count) {
    int value = 0;
    for (int k = 0; k < 5; ++k) value = 3 * value + (k < count ? codes[k * step] + 1 : 0);
    return static_cast<uint8_t>((value * 256 + 242) / 243);
  }

  /// The reverse of `pack_trits`. All 256 bytes have digits; those 13 that no number gives share them with
  /// others.
  static QAT_HD void unpack_trits(uint8_t byte, int8_t* codes, int step, int count) {
    int rest = byte;
    for (int k = 0; k < count; ++k) {
      codes[k * step] = static_cast<int8_t>((3 * rest >> 8) - 1);
      rest = 3 * rest & 0xff;
    }
  }
};

}  // namespace qat::grid
