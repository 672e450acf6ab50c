#pragma once

// q4_k and q5_k (ggml's Q4_K, Q5_K): 256 weights in 8 sub-blocks of 32; 6-bit sub-scales and sub-minima,
// codes of 4 or 5 bits; w_hat = (f16(d) * sub_scale) * code - f16(dmin) * sub_min. Rule: a search for scale
// and minimum in each sub-block (kquant_search.hpp) with weights rms + |w|; the largest scale and the largest
// minimum become 63 steps of d and dmin. (ggml/src/ggml-quants.c, quantize_row_q4_K_ref,
// quantize_row_q5_K_ref)

#include "qat/grid/kquant.hpp"

namespace qat::grid {

/// The rule of both, which differ in the codes and in the candidates of the search.
template <int kMax>
struct SixBitScaleRule {
  static constexpr int kWeights = 32;
  static constexpr int kCodeMax = kMax;
  static constexpr int kScaleMax = 63;
  static constexpr bool kAbsolute = false;
  static constexpr float kFirst = kMax == 15 ? -1.0F : -0.5F;
  static constexpr float kStep = 0.1F;
  static constexpr int kSteps = kMax == 15 ? 20 : 15;

  template <class F>
  static QAT_HD void weigh(const F* x, F* weights) {
    F sum = 0.0F;
    for (int i = 0; i < kWeights; ++i) sum = sum + x[i] * x[i];
    const F rms = square_root(sum / F(32.0F));
    for (int i = 0; i < kWeights; ++i) weights[i] = rms + magnitude(x[i]);
  }

  /// ggml keeps an integer's low byte before it holds it at 63, so that a negative one becomes 63.
  static QAT_HD float sub_integer(float value) {
    const auto byte = static_cast<uint8_t>(static_cast<int>(ggml_code(value, -0x400000, 0x3fffff)));
    return byte < kScaleMax ? byte : kScaleMax;
  }

  static QAT_HD void combine(const float* scales, const float* minimums, float* s) {
    constexpr int kSubBlocks = kSuperBlock / kWeights;
    float largest_scale = 0.0F;
    float largest_minimum = 0.0F;
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      largest_scale = greater(scales[sub], largest_scale);
      largest_minimum = greater(minimums[sub], largest_minimum);
    }
    s[0] = largest_scale / 63.0F;
    s[1] = largest_minimum / 63.0F;
    const float to_scale = largest_scale > 0.0F ? 63.0F / largest_scale : 0.0F;
    const float to_minimum = largest_minimum > 0.0F ? 63.0F / largest_minimum : 0.0F;
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      s[2 + sub] = sub_integer(to_scale * scales[sub]);
      s[2 + kSubBlocks + sub] = sub_integer(to_minimum * minimums[sub]);
    }
  }
};

inline constexpr Field kSixBitScaleFields[] = {{"scales", 1, DType::kF16},
                                               {"mins", 1, DType::kF16},
                                               {"sub_scales", 8, DType::kU8},
                                               {"sub_mins", 8, DType::kU8}};

/// stored -> 16 bytes: d f16 | dmin f16 | 12 bytes with 8 + 8 integers of 6 bits. Bytes 0..3 and 4..7: scale
/// and minimum of sub-blocks 0..3 in the low 6 bits, the top 2 bits of those of sub-blocks 4..7 above;
/// bytes 8..11: the low nibbles of the latter.
QAT_HD void pack_six_bit_scales(const float* stored, uint8_t* bytes) {
  put_f16(stored[0], bytes);
  put_f16(stored[1], bytes + 2);
  for (int j = 0; j < 4; ++j) {
    const int scale = static_cast<int>(stored[2 + j]);
    const int minimum = static_cast<int>(stored[10 + j]);
    const int later_scale = static_cast<int>(stored[6 + j]);
    const int later_minimum = static_cast<int>(stored[14 + j]);
    bytes[4 + j] = static_cast<uint8_t>(scale | ((later_scale >> 4) << 6));
    bytes[8 + j] = static_cast<uint8_t>(minimum | ((later_minimum >> 4) << 6));
    bytes[12 + j] = static_cast<uint8_t>((later_scale & 0xf) | ((later_minimum & 0xf) << 4));
  }
}

/// The reverse of `pack_six_bit_scales`.
QAT_HD void unpack_six_bit_scales(const uint8_t* bytes, float* stored) {
  stored[0] = get_f16(bytes);
  stored[1] = get_f16(bytes + 2);
  for (int j = 0; j < 4; ++j) {
    stored[2 + j] = static_cast<float>(bytes[4 + j] & 63);
    stored[10 + j] = static_cast<float>(bytes[8 + j] & 63);
    stored[6 + j] = static_cast<float>((bytes[12 + j] & 0xf) | ((bytes[4 + j] >> 6) << 4));
    stored[14 + j] = static_cast<float>((bytes[12 + j] >> 4) | ((bytes[8 + j] >> 6) << 4));
  }
}

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q4_K : AffineKQuant<SixBitScaleRule<15>> {
  static constexpr Info kInfo{"q4_k", 4, kSuperBlock, 0, 15, kSixBitScaleFields, false, DType::kF32};

  /// Bytes: d, dmin, scales[12] | 4 runs of 32 bytes: byte l of run r = element 64 r + l (low nibble) and
  /// 64 r + 32 + l (high).
  static constexpr int64_t kBlockBytes = 144;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    pack_six_bit_scales(stored, bytes);
    for (int i = 0; i < kSuperBlock / 2; ++i) {
      const int8_t* run = codes + i / 32 * 64 + i % 32;
      bytes[16 + i] = static_cast<uint8_t>(run[0] | (run[32] << 4));
    }
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    unpack_six_bit_scales(bytes, stored);
    for (int i = 0; i < kSuperBlock / 2; ++i) {
      int8_t* run = codes + i / 32 * 64 + i % 32;
      run[0] = static_cast<int8_t>(bytes[16 + i] & 0xf);
      run[32] = static_cast<int8_t>(bytes[16 + i] >> 4);
    }
  }
};

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q5_K : AffineKQuant<SixBitScaleRule<31>> {
  static constexpr Info kInfo{"q5_k", 5, kSuperBlock, 0, 31, kSixBitScaleFields, false, DType::kF32};

  /// Bytes: d, dmin, scales[12] | fifth bits[32]: bits 2 r and 2 r + 1 of byte l belong to elements 64 r + l
  /// and 64 r + 32 + l | low nibbles as in Q4_K.
  static constexpr int64_t kBlockBytes = 176;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    pack_six_bit_scales(stored, bytes);
    for (int l = 0; l < 32; ++l) bytes[16 + l] = 0;
    for (int i = 0; i < kSuperBlock / 2; ++i) {
      const int8_t* run = codes + i / 32 * 64 + i % 32;
      const int high = (run[0] >> 4) | ((run[32] >> 4) << 1);
      bytes[16 + i % 32] = static_cast<uint8_t>(bytes[16 + i % 32] | (high << (2 * (i / 32))));
      bytes[48 + i] = static_cast<uint8_t>((run[0] & 0xf) | ((run[32] & 0xf) << 4));
    }
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    unpack_six_bit_scales(bytes, stored);
    for (int i = 0; i < kSuperBlock / 2; ++i) {
      int8_t* run = codes + i / 32 * 64 + i % 32;
      const int high = bytes[16 + i % 32] >> (2 * (i / 32));
      run[0] = static_cast<int8_t>((bytes[48 + i] & 0xf) | ((high & 1) << 4));
      run[32] = static_cast<int8_t>((bytes[48 + i] >> 4) | ((high & 2) << 3));
    }
  }
};

}  // namespace qat::grid
