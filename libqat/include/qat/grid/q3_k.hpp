#pragma once

// q3_k (ggml's Q3_K): 256 weights in 16 sub-blocks of 16; 6-bit sub-scales -32..31, codes -4..3;
// w_hat = (f16(d) * sub_scale) * code.
// Rule: in each sub-block codes and scale by least squares with weights w^2, code after code moved to where
// it is best (kquant_search.hpp); the scale of largest magnitude becomes -32 steps of d. Where all scales are
// 0, ggml writes zero bytes for the sub-scales, which read as -32.
// (ggml/src/ggml-quants.c, quantize_row_q3_K_ref)

#include "qat/grid/kquant.hpp"

namespace qat::grid {

struct SixBitSignedScaleRule {
  static constexpr int kLevels = 4;
  static constexpr int kScaleMin = -32;
  static constexpr int kScaleMax = 31;

  template <class F>
  static QAT_HD F fit(const F* x, F* codes) {
    return descended_fit<16, kLevels>(x, codes);
  }

  static QAT_HD void combine(const float* scales, float* s) {
    const Largest<float> largest = first_largest(scales, 16);
    const float inverse = -32.0F / largest.signed_value;
    const bool none = largest.signed_value == 0.0F;
    s[0] = none ? 0.0F : 1.0F / inverse;
    for (int sub = 0; sub < 16; ++sub) {
      s[1 + sub] = none ? -32.0F : sub_integer(inverse * scales[sub]);
    }
  }

  /// ggml keeps an integer's low byte before it holds it in -32..31.
  static QAT_HD float sub_integer(float value) {
    const int byte = static_cast<int8_t>(static_cast<int>(ggml_code(value, -0x400000, 0x3fffff)));
    return static_cast<float>(byte < kScaleMin ? kScaleMin : byte > kScaleMax ? kScaleMax : byte);
  }
};

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q3_K : SymmetricKQuant<SixBitSignedScaleRule> {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}, {"sub_scales", 16, DType::kI8}};
  static constexpr Info kInfo{"q3_k", 3, kSuperBlock, -4, 3, kFields, false, DType::kF32};

  /// Bytes: third bits[32]: bit k of byte l belongs to element 32 k + l | low two bits[64], see
  /// `pack_quarters`; both of code + 4 | 12 bytes of sub-scales + 32: byte j < 8 holds the low nibbles of
  /// sub-blocks j and j + 8, byte 8 + j the high pairs of j, j + 4, j + 8, j + 12 | d f16.
  static constexpr int64_t kBlockBytes = 110;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    int8_t low[kSuperBlock];
    for (int l = 0; l < 32; ++l) bytes[l] = 0;
    for (int i = 0; i < kSuperBlock; ++i) {
      const int raw = codes[i] - kInfo.code_min;
      low[i] = static_cast<int8_t>(raw & 3);
      bytes[i % 32] = static_cast<uint8_t>(bytes[i % 32] | ((raw >> 2) << (i / 32)));
    }
    pack_quarters(low, bytes + 32);
    for (int j = 0; j < 12; ++j) bytes[96 + j] = 0;
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const int raw = static_cast<int>(stored[1 + sub]) + 32;
      uint8_t* nibble = bytes + 96 + sub % 8;
      uint8_t* pair = bytes + 104 + sub % 4;
      *nibble = static_cast<uint8_t>(*nibble | ((raw & 0xf) << (sub / 8 * 4)));
      *pair = static_cast<uint8_t>(*pair | ((raw >> 4) << (sub / 4 * 2)));
    }
    put_f16(stored[0], bytes + 108);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    unpack_quarters(bytes + 32, codes);
    for (int i = 0; i < kSuperBlock; ++i) {
      const int high = (bytes[i % 32] >> (i / 32)) & 1;
      codes[i] = static_cast<int8_t>(codes[i] + 4 * high + kInfo.code_min);
    }
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const int nibble = (bytes[96 + sub % 8] >> (sub / 8 * 4)) & 0xf;
      const int pair = (bytes[104 + sub % 4] >> (sub / 4 * 2)) & 3;
      stored[1 + sub] = static_cast<float>((nibble | (pair << 4)) - 32);
    }
    stored[0] = get_f16(bytes + 108);
  }
};

}  // namespace qat::grid
