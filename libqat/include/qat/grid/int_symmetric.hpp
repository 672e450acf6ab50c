#pragma once

// int8_channel ... int2_channel and int8_g32 ... int2_g256 (compressed-tensors, strategies "channel" and
// "group", symmetric): one float32 scale per row, or per group of consecutive weights of a row; w_hat =
// code * s, codes -2^(b-1) .. 2^(b-1) - 1. Rule (its memoryless min-max observer): s = max|w| / ((2^b - 1) /
// 2), and 2^-23, the epsilon of float32, where that is 0; code = clamp(w / s), rounded half to even.
// (compressed_tensors/quantization/utils/helpers.py calculate_qparams, lifecycle/forward.py _quantize)

#include <array>

#include "qat/grid/bf16.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// "int4_channel" or "int4_g32", ended by a zero.
consteval std::array<char, 16> int_symmetric_name(int bits, int64_t block) {
  std::array<char, 16> name{};
  size_t length = 0;
  const auto append = [&](std::string_view text) {
    for (const char letter : text) name[length++] = letter;
  };
  append("int");
  name[length++] = static_cast<char>('0' + bits);
  if (block == kWholeRow) {
    append("_channel");
    return name;
  }
  append("_g");
  int64_t unit = 1;
  while (unit * 10 <= block) unit *= 10;
  for (; unit > 0; unit /= 10) name[length++] = static_cast<char>('0' + block / unit % 10);
  return name;
}

/// kBits: 2, 3, 4 or 8. kBlock: weights that share a scale, or kWholeRow.
template <int kBits, int64_t kBlock>
struct IntSymmetric {
  static_assert(kBits == 2 || kBits == 3 || kBits == 4 || kBits == 8);
  static_assert(kBlock == kWholeRow || (kBlock > 0 && kBlock < 1000));
  static constexpr Field kFields[] = {{"scales", 1, DType::kF32}};
  static constexpr std::array<char, 16> kName = int_symmetric_name(kBits, kBlock);
  static constexpr int kCodeMin = -(1 << (kBits - 1));
  static constexpr int kCodeMax = (1 << (kBits - 1)) - 1;
  static constexpr Info kInfo{kName.data(), kBits, kBlock, kCodeMin, kCodeMax, kFields, false, DType::kF32};

  static constexpr float kHalfRange = static_cast<float>((1 << kBits) - 1) / 2.0F;
  static constexpr float kZeroScale = 0x1p-23F;
  /// With a larger scale, the code of the largest magnitude decodes beyond bfloat16 (and maybe beyond
  /// float32).
  static constexpr float kMaxScale = kBf16Max / static_cast<float>(-kCodeMin);

  static QAT_HD float scale_of(float largest) {
    const float scale = largest / kHalfRange;
    return scale == 0.0F ? kZeroScale : scale;
  }

  static QAT_HD void choose(const float* w, int64_t n, float* s) { s[0] = scale_of(absolute_maximum(w, n)); }

  static QAT_HD Status store(const float* s, float* stored) {
    stored[0] = s[0];
    if (s[0] != s[0]) return Status::kNotFinite;
    return magnitude(s[0]) <= kMaxScale ? Status::kOk : Status::kOverflow;
  }

  /// Prepared once per block. A learned scale of 0 decodes everything to 0; dividing by infinity picks code 0
  /// for it.
  struct Encoder {
    float divisor;
  };

  static QAT_HD Encoder encoder(const float* s) { return {s[0] == 0.0F ? float_of(kInfinityBits) : s[0]}; }

  static QAT_HD int encode(float w, const Encoder& e) {
    return round_half_even(clamp(w / e.divisor, static_cast<float>(kCodeMin), static_cast<float>(kCodeMax)));
  }

  static QAT_HD float decode(int code, const float* stored) { return static_cast<float>(code) * stored[0]; }

  static QAT_HD bool in_range(float w, const Encoder& e) { return inside(w / e.divisor, kCodeMin, kCodeMax); }
};

}  // namespace qat::grid
