#pragma once

// q6_k (ggml's Q6_K): 256 weights in 16 sub-blocks of 16; sub-scales are signed bytes, codes -32..31;
// w_hat = (f16(d) * sub_scale) * code.
// Rule: in each sub-block the best of 19 scales by least squares with weights w^2 (kquant_search.hpp); the
// scale of largest magnitude becomes -128 steps of d. A block without a scale of 1e-15 is all zero bytes.
// (ggml/src/ggml-quants.c, quantize_row_q6_K_ref)

#include "qat/grid/kquant.hpp"

namespace qat::grid {

struct SignedByteScaleRule {
  static constexpr int kLevels = 32;
  static constexpr int kScaleMin = -128;
  static constexpr int kScaleMax = 127;

  template <class F>
  static QAT_HD F fit(const F* x, F* codes) {
    return symmetric_fit<16, kLevels>(x, codes);
  }

  static QAT_HD void combine(const float* scales, float* s) {
    const Largest<float> largest = first_largest(scales, 16);
    if (largest.size < kNoScale) {
      for (int i = 0; i < 17; ++i) s[i] = 0.0F;
      return;
    }
    const float inverse = -128.0F / largest.signed_value;
    s[0] = 1.0F / inverse;
    for (int sub = 0; sub < 16; ++sub) s[1 + sub] = ggml_code(inverse * scales[sub], -128, 127);
  }
};

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q6_K : SymmetricKQuant<SignedByteScaleRule> {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}, {"sub_scales", 16, DType::kI8}};
  static constexpr Info kInfo{"q6_k", 6, kSuperBlock, -32, 31, kFields, false, DType::kF32};

  /// True when ggml writes nothing but zero bytes.
  static QAT_HD bool is_empty(const float* w) {
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      if (magnitude(SignedByteScaleRule::fit<float>(w + sub * kWeights, nullptr)) >= kNoScale) return false;
    }
    return true;
  }

  static QAT_HD void encode_block(const float* w, int64_t n, const float* s, int8_t* codes) {
    SymmetricKQuant::encode_block(w, n, s, codes);
    if (f16_value(f16_bits(s[0])) == 0.0F && is_empty(w)) {
      for (int i = 0; i < kSuperBlock; ++i) codes[i] = kInfo.code_min;
    }
  }

  /// Bytes: low nibbles[128] | high pairs of bits[64] | sub-scales[16] | d f16. Of element 128 h + 32 k + l
  /// of half h, with its code + 32: low nibble in byte 64 h + l (k = 0, 2) or 64 h + 32 + l (k = 1, 3), high
  /// half of the byte for k = 2, 3; the high bits are bits 2 k of byte 32 h + l.
  static constexpr int64_t kBlockBytes = 210;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    for (int i = 0; i < kSuperBlock / 4; ++i) {
      const int8_t* of = codes + i / 32 * 128 + i % 32;
      int raw[4];
      for (int k = 0; k < 4; ++k) raw[k] = of[32 * k] - kInfo.code_min;
      uint8_t* low = bytes + i / 32 * 64 + i % 32;
      low[0] = static_cast<uint8_t>((raw[0] & 0xf) | ((raw[2] & 0xf) << 4));
      low[32] = static_cast<uint8_t>((raw[1] & 0xf) | ((raw[3] & 0xf) << 4));
      bytes[128 + i] = static_cast<uint8_t>((raw[0] >> 4) | ((raw[1] >> 4) << 2) | ((raw[2] >> 4) << 4) |
                                            ((raw[3] >> 4) << 6));
    }
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      bytes[192 + sub] = static_cast<uint8_t>(static_cast<int8_t>(stored[1 + sub]));
    }
    put_f16(stored[0], bytes + 208);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    for (int i = 0; i < kSuperBlock / 4; ++i) {
      int8_t* of = codes + i / 32 * 128 + i % 32;
      const uint8_t* low = bytes + i / 32 * 64 + i % 32;
      for (int k = 0; k < 4; ++k) {
        const int nibble = (low[k % 2 * 32] >> (k / 2 * 4)) & 0xf;
        const int raw = nibble | (((bytes[128 + i] >> (2 * k)) & 3) << 4);
        of[32 * k] = static_cast<int8_t>(raw + kInfo.code_min);
      }
    }
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      stored[1 + sub] = static_cast<float>(static_cast<int8_t>(bytes[192 + sub]));
    }
    stored[0] = get_f16(bytes + 208);
  }
};

}  // namespace qat::grid
