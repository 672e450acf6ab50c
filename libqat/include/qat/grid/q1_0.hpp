#pragma once

// q1_0 (ggml): 128 weights share one scale d; w_hat = f16(d) for code 1, -f16(d) for code 0.
// Rule: d = mean |w|, summed in order in float32; code = w >= 0. No weight decodes to 0, unless d is 0.
// (ggml/src/ggml-quants.c, quantize_row_q1_0_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/rule_gradient.hpp"

namespace qat::grid {

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q1_0 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}};
  static constexpr Info kInfo{"q1_0", 1, 128, 0, 1, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) {
    float sum = 0.0F;
    for (int64_t i = 0; i < n; ++i) sum += magnitude(w[i]);
    s[0] = sum / 128.0F;
  }

  static QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) {
    for (int64_t i = 0; i < n; ++i) grad_w[i] += grad_s[0] * sign_of(w[i]) / 128.0F;
  }

  static QAT_HD Status store(const float* s, float* stored) { return store_f16(s[0], stored); }

  /// Prepared once per block. A negative d, which only a learned scale can be, exchanges the two levels.
  struct Encoder {
    float sign;
    float limit;
  };

  static QAT_HD Encoder encoder(const float* s) {
    return {s[0] < 0.0F ? -1.0F : 1.0F, s[0] == 0.0F ? float_of(kInfinityBits) : magnitude(s[0])};
  }

  static QAT_HD int encode(float w, const Encoder& e) { return w * e.sign >= 0.0F ? 1 : 0; }

  static QAT_HD float decode(int code, const float* stored) { return code != 0 ? stored[0] : -stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return magnitude(w) <= e.limit * (1.0F + 0x1p-20F);
  }

  /// Bytes: d f16 | 16 bytes, byte j = elements 8j to 8j + 7, low bits first.
  static constexpr int64_t kBlockBytes = 18;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    put_f16(stored[0], bytes);
    for (int j = 0; j < 16; ++j) {
      int byte = 0;
      for (int k = 0; k < 8; ++k) byte |= codes[8 * j + k] << k;
      bytes[2 + j] = static_cast<uint8_t>(byte);
    }
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    stored[0] = get_f16(bytes);
    for (int i = 0; i < 128; ++i) codes[i] = static_cast<int8_t>((bytes[2 + i / 8] >> (i % 8)) & 1);
  }
};

}  // namespace qat::grid
