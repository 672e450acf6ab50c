#pragma once

// q2_k (ggml's Q2_K): 256 weights in 16 sub-blocks of 16; 4-bit sub-scales and sub-minima, codes 0..3;
// w_hat = (f16(d) * sub_scale) * code - f16(dmin) * sub_min.
// Rule: a search for scale and minimum in each sub-block (kquant_search.hpp) with weights |w| and absolute
// errors; the largest scale and the largest minimum become 15 steps of d and dmin.
// (ggml/src/ggml-quants.c, quantize_row_q2_K_ref)

#include "qat/grid/kquant.hpp"

namespace qat::grid {

/// The candidates of ggml's q2_k by plain squared errors.
struct EvenlyWeighted {
  static constexpr int kWeights = 16;
  static constexpr int kCodeMax = 3;
  static constexpr bool kAbsolute = false;
  static constexpr float kFirst = -0.5F;
  static constexpr float kStep = 0.1F;
  static constexpr int kSteps = 15;

  /// All alike.
  template <class F>
  static QAT_HD void weigh(const F*, F* weights) {
    for (int i = 0; i < kWeights; ++i) weights[i] = 1.0F;
  }
};

struct FourBitScaleRule {
  /// For `search`: ggml's weights and absolute errors lead away from the least squared error.
  using SecondStart = EvenlyWeighted;
  static constexpr int kWeights = 16;
  static constexpr int kCodeMax = 3;
  static constexpr int kScaleMax = 15;
  static constexpr bool kAbsolute = true;
  static constexpr float kFirst = -0.5F;
  static constexpr float kStep = 0.1F;
  static constexpr int kSteps = 15;

  template <class F>
  static QAT_HD void weigh(const F* x, F* weights) {
    for (int i = 0; i < kWeights; ++i) weights[i] = magnitude(x[i]);
  }

  /// The low byte of ggml's `nearest_int`.
  static QAT_HD int low_byte(float value) {
    return static_cast<uint8_t>(static_cast<int>(ggml_code(value, -0x400000, 0x3fffff)));
  }

  /// ggml makes one byte of both integers before it reads them again, so that a negative scale (which only
  /// rounding errors can give) spoils both.
  static QAT_HD void combine(const float* scales, const float* minimums, float* s) {
    constexpr int kSubBlocks = kSuperBlock / kWeights;
    float largest_scale = 0.0F;
    float largest_minimum = 0.0F;
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      largest_scale = greater(scales[sub], largest_scale);
      largest_minimum = greater(minimums[sub], largest_minimum);
    }
    s[0] = largest_scale / 15.0F;
    s[1] = largest_minimum / 15.0F;
    const float to_scale = 15.0F / largest_scale;
    const float to_minimum = 15.0F / largest_minimum;
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      int byte = largest_scale > 0.0F ? low_byte(to_scale * scales[sub]) : 0;
      if (largest_minimum > 0.0F) byte |= (low_byte(to_minimum * minimums[sub]) << 4) & 0xff;
      s[2 + sub] = static_cast<float>(byte & 0xf);
      s[2 + kSubBlocks + sub] = static_cast<float>(byte >> 4);
    }
  }
};

// NOLINTNEXTLINE(readability-identifier-naming): ggml's own spelling.
struct Q2_K : AffineKQuant<FourBitScaleRule> {
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16},
                                      {"mins", 1, DType::kF16},
                                      {"sub_scales", 16, DType::kU8},
                                      {"sub_mins", 16, DType::kU8}};
  static constexpr Info kInfo{"q2_k", 2, kSuperBlock, 0, 3, kFields, false, DType::kF32};

  /// Bytes: 16 of sub-scale (low nibble) and sub-minimum (high) | codes[64], see `pack_quarters` | d f16 |
  /// dmin f16.
  static constexpr int64_t kBlockBytes = 84;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const int minimum = static_cast<int>(stored[2 + kSubBlocks + sub]);
      bytes[sub] = static_cast<uint8_t>(static_cast<int>(stored[2 + sub]) | (minimum << 4));
    }
    pack_quarters(codes, bytes + 16);
    put_f16(stored[0], bytes + 80);
    put_f16(stored[1], bytes + 82);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      stored[2 + sub] = static_cast<float>(bytes[sub] & 0xf);
      stored[2 + kSubBlocks + sub] = static_cast<float>(bytes[sub] >> 4);
    }
    unpack_quarters(bytes + 16, codes);
    stored[0] = get_f16(bytes + 80);
    stored[1] = get_f16(bytes + 82);
  }
};

}  // namespace qat::grid
