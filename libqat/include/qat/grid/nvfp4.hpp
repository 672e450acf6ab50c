#pragma once

// nvfp4 (ggml, MLX): 16 weights share a scale s, stored as e4m3; w_hat = e2m1(code) * s. There is no factor
// per tensor, so the least scale is 2^-9: weights should be of the order of 0.01 or more. Rule: s = max|w| /
// 6 as e4m3, code = nearest, ties to the smaller magnitude. (ggml/src/ggml-quants.c, quantize_row_nvfp4_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/e2m1.hpp"
#include "qat/grid/e4m3.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

struct Nvfp4 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kE4M3}};
  static constexpr Info kInfo{"nvfp4", 4, 16, 0, 15, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = scale_of(absolute_maximum(w, n)); }

  static QAT_HD float scale_of(float largest) { return ggml_e4m3(largest / kE2M1Max); }

  static QAT_HD void search(const float* w, int64_t n, float* s) {
    const float largest = absolute_maximum(w, n);
    s[0] = search_e2m1<Nvfp4, BestScale<Nvfp4>>(w, n, largest, scale_of(largest));
  }

  /// The scales near the rule's: an octave is 8 steps, and with a scale up to 6/4 as large the largest weight
  /// falls on 4 instead of 6.
  template <class Best>
  static QAT_HD void offer_near(float s, Best& best) {
    const int reference = e4m3_bits(s);
    for (int byte = reference - 3; byte <= reference + 6; ++byte) {
      if (byte > 0 && byte < 0x7f) best.offer(e4m3_value(static_cast<uint8_t>(byte)));
    }
  }

  /// ggml's own rounding to e4m3: ties up, and everything from 248 on becomes 448. ggml also saturates what
  /// is too large for 448; here it stays as it is, so that `store` refuses it.
  static QAT_HD float ggml_e4m3(float value) {
    if (value > 464.0F) return value;
    if (value >= 248.0F) return kE4M3Max;
    if (value < 0x1p-6F) {
      const int units = static_cast<int>(value * 512.0F + 0.5F);
      return static_cast<float>(units < 7 ? units : 7) * 0x1p-9F;
    }
    return float_of((bits_of(value) + 0x80000U) & 0xfff00000U);
  }

  /// The nearest e4m3 number, ties to even. The sign bit is none in ggml: negative scales give 0.
  static QAT_HD Status store(const float* s, float* stored) {
    stored[0] = e4m3_value(e4m3_bits(s[0] > 0.0F ? s[0] : 0.0F));
    if (s[0] != s[0]) return Status::kNotFinite;
    return is_finite(stored[0]) ? Status::kOk : Status::kOverflow;
  }

  /// Prepared once per block: the stored scale, with which ggml picks codes; infinite for a scale of 0.
  struct Encoder {
    float scale;
  };

  static QAT_HD Encoder encoder(const float* s) {
    float stored;
    store(s, &stored);
    return {stored == 0.0F ? float_of(kInfinityBits) : stored};
  }

  static QAT_HD int encode(float w, const Encoder& e) { return e2m1_code(w, e.scale); }

  static QAT_HD float decode(int code, const float* stored) { return e2m1_value(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return magnitude(w) <= kE2M1Max * (1.0F + 0x1p-20F) * e.scale;
  }

  /// ggml's block holds four of these: 4 scales, e4m3 | 8 bytes each, byte j of group g = element 16 g + j
  /// (low nibble) and 16 g + j + 8 (high).
  static constexpr int64_t kPackedBlock = 64;
  static constexpr int64_t kBlockBytes = 36;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    for (int g = 0; g < 4; ++g) {
      bytes[g] = e4m3_bits(stored[g]);
      for (int j = 0; j < 8; ++j) {
        const int8_t* const low = codes + 16 * g + j;
        bytes[4 + 8 * g + j] = static_cast<uint8_t>(low[0] | (low[8] << 4));
      }
    }
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    for (int g = 0; g < 4; ++g) {
      stored[g] = e4m3_value(bytes[g] & 0x7f);
      for (int j = 0; j < 8; ++j) {
        codes[16 * g + j] = static_cast<int8_t>(bytes[4 + 8 * g + j] & 0xf);
        codes[16 * g + j + 8] = static_cast<int8_t>(bytes[4 + 8 * g + j] >> 4);
      }
    }
  }
};

}  // namespace qat::grid
