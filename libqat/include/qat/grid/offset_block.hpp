#pragma once

// q4_1 and q5_1 (ggml): 32 weights share a scale d >= 0 and a minimum m; w_hat = code * f16(d) + f16(m),
// codes 0..15 (0..31). Rule: m = min, d = (max - min) / 15 (31), code = trunc((w - m) * (1/d) + 0.5), at most
// 15 (31). Codes are picked with the unrounded d and m. (ggml/src/ggml-quants.c, quantize_row_q4_1_ref,
// quantize_row_q5_1_ref)

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/ggml_block.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/rule_gradient.hpp"
#include "qat/grid/search_line.hpp"

namespace qat::grid {

/// kBits: 4 or 5.
template <int kBits>
struct OffsetBlock {
  static_assert(kBits == 4 || kBits == 5);
  static constexpr int kCodeMax = (1 << kBits) - 1;
  static constexpr Field kFields[] = {{"scales", 1, DType::kF16}, {"mins", 1, DType::kF16}};
  static constexpr Info kInfo{
      kBits == 4 ? "q4_1" : "q5_1", kBits, 32, 0, kCodeMax, kFields, false, DType::kF32};

  static QAT_HD void choose(const float* w, int64_t n, float* s) {
    float least = w[0];
    float greatest = w[0];
    for (int64_t i = 1; i < n; ++i) {
      least = w[i] < least ? w[i] : least;
      greatest = w[i] > greatest ? w[i] : greatest;
    }
    s[0] = (greatest - least) / static_cast<float>(kCodeMax);
    s[1] = least;
  }

  static QAT_HD void choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) {
    const EndPlaces ends = places_of_ends(w, n);
    const float step = grad_s[0] / static_cast<float>(kCodeMax);
    grad_w[ends.greatest] += step;
    grad_w[ends.least] += grad_s[1] - step;
  }

  static QAT_HD void search(const float* w, int64_t n, float* s) {
    search_scale_and_offset(OffsetBlock{}, w, n, s);
  }

  static QAT_HD Status store(const float* s, float* stored) {
    const Status scale = store_f16(s[0], stored);
    const Status minimum = store_f16(s[1], stored + 1);
    return scale != Status::kOk ? scale : minimum;
  }

  /// Prepared once per block. An overflowing 1/d gives code 0 for every weight, as ggml's does (see Q4_0).
  struct Encoder {
    float inverse;
    float minimum;
  };

  static QAT_HD Encoder encoder(const float* s) {
    const float inverse = ggml_inverse(s[0]);
    return {is_finite(inverse) ? inverse : 0.0F, s[1]};
  }

  static QAT_HD int encode(float w, const Encoder& e) {
    return static_cast<int>(clamp((w - e.minimum) * e.inverse + 0.5F, 0.0F, static_cast<float>(kCodeMax)));
  }

  static QAT_HD float decode(int code, const float* stored) {
    return static_cast<float>(code) * stored[0] + stored[1];
  }

  static QAT_HD bool in_range(float w, const Encoder& e) {
    // The least weight gives exactly 0, so only the upper border needs its width.
    return inside((w - e.minimum) * e.inverse, kInfo.code_min, kInfo.code_max);
  }

  /// Bytes: d f16 | m f16 | the codes as `pack_halves` lays them out.
  static constexpr int64_t kBlockBytes = 4 + 4 * kBits;

  static QAT_HD void pack_block(const int8_t* codes, const float* stored, uint8_t* bytes) {
    put_f16(stored[0], bytes);
    put_f16(stored[1], bytes + 2);
    pack_halves<kBits>(codes, kInfo.code_min, bytes + 4);
  }

  static QAT_HD void unpack_block(const uint8_t* bytes, int8_t* codes, float* stored) {
    stored[0] = get_f16(bytes);
    stored[1] = get_f16(bytes + 2);
    unpack_halves<kBits>(bytes + 4, kInfo.code_min, codes);
  }
};

// NOLINTBEGIN(readability-identifier-naming): ggml's own spelling.
/// Codes 0..15.
using Q4_1 = OffsetBlock<4>;
/// Codes 0..31.
using Q5_1 = OffsetBlock<5>;
// NOLINTEND(readability-identifier-naming)

}  // namespace qat::grid
