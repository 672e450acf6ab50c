#pragma once

// mxfp4 (OCP MX, ggml): 32 weights share a power of two s, stored as e8m0; w_hat = e2m1(code) * s.
// Rule: s = 2^(floor(log2(max|w|)) - 2), code = nearest, ties to the smaller magnitude. Weights beyond 6 s,
// up to the block's maximum below 8 s, saturate. (ggml/src/ggml-quants.c, quantize_row_mxfp4_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/e2m1.hpp"
#include "qat/grid/e8m0.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

struct Mxfp4 {
  static constexpr Field kFields[] = {{"scales", 1, DType::kE8M0}};
  static constexpr Info kInfo{"mxfp4", 4, 32, 0, 15, kFields, false, DType::kF32};

  static constexpr float kMinScale = 0x1p-127F;
  /// With a larger scale the code of 6 decodes beyond float32.
  static constexpr float kMaxScale = 0x1p125F;

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = scale_of(absolute_maximum(w, n)); }

  static QAT_HD void search(const float* w, int64_t n, float* s) {
    const float largest = absolute_maximum(w, n);
    s[0] = search_e2m1<Mxfp4, BestScale<Mxfp4>>(w, n, largest, scale_of(largest));
  }

  /// The powers of two beside the rule's: the greater one clips nothing, the smaller one clips more.
  template <class Best>
  static QAT_HD void offer_near(float s, Best& best) {
    best.offer(2.0F * s);
    best.offer(0.5F * s);
  }

  /// 2^(floor(log2f(largest)) - 2), at least 2^-127 (where ggml's byte wraps around; all zero is 2^-127 in
  /// ggml too). log2f is the float nearest to the logarithm: a number few units below a power of two has that
  /// power itself, which is reproduced by counting the units.
  static QAT_HD float scale_of(float largest) {
    const uint32_t bits = bits_of(largest);
    int exponent = static_cast<int>(bits >> 23) - 127;
    // Floats just below the logarithm are 2^(e - 23) apart, where 2^e <= distance, so that numbers up to
    // 2^e * ln(2) units below the power of two round to it.
    const int distance = exponent < 0 ? -1 - exponent : exponent;
    const float apart = float_of(bits_of(static_cast<float>(distance)) & kInfinityBits);
    const auto units_below = static_cast<float>(0x800000U - (bits & 0x7fffffU));
    if (units_below <= apart * 0.6931472F) ++exponent;
    return exponent - 2 < -127 ? kMinScale : e8m0_value(static_cast<uint8_t>(exponent - 2 + 127));
  }

  /// The nearest power of two, ties to the greater; zero and negative scales give the least one.
  static QAT_HD Status store(const float* s, float* stored) {
    const float nearest = float_of((bits_of(s[0]) + 0x400000U) & kInfinityBits);
    stored[0] = s[0] >= 1.5F * kMinScale ? nearest : kMinScale;
    if (s[0] != s[0]) return Status::kNotFinite;
    return stored[0] <= kMaxScale ? Status::kOk : Status::kOverflow;
  }

  /// Prepared once per block: the stored scale, with which ggml picks codes; infinite for a scale of 0.
  struct Encoder {
    float scale;
  };

  static QAT_HD Encoder encoder(const float* s) {
    float stored;
    store(s, &stored);
    return {s[0] == 0.0F ? float_of(kInfinityBits) : stored};
  }

  static QAT_HD int encode(float w, const Encoder& e) { return e2m1_code(w, e.scale); }

  static QAT_HD float decode(int code, const float* stored) { return e2m1_value(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    return magnitude(w) <= kE2M1Max * (1.0F + 0x1p-20F) * e.scale;
  }

  /// Bytes: the exponent, e8m0 | 16 bytes, byte j = element j (low nibble) and j + 16 (high).
  static constexpr int64_t kBlockBytes = 17;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    bytes[0] = e8m0_bits(stored[0]);
    pack_nibbles(codes, 0, bytes + 1);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    stored[0] = e8m0_value(bytes[0]);
    unpack_nibbles(bytes + 1, 0, codes);
  }
};

}  // namespace qat::grid
