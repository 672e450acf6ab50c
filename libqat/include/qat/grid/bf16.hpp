#pragma once

// bf16: the upper half of a float32, rounded to nearest, ties to even.

#include "qat/grid/device.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// float32 -> bfloat16, nearest even. Beyond 3.3895e38 the result is an infinity; a NaN stays one.
QAT_HD uint16_t bf16_bits(float value) {
  const uint32_t bits = bits_of(value);
  if (magnitude_bits(value) > kInfinityBits) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

/// bfloat16 -> float32, exact.
QAT_HD float bf16_value(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}

/// The largest finite bfloat16.
inline constexpr float kBf16Max = 0x1.fep127F;

struct BF16 {
  static constexpr Info kInfo{"bf16", 16, 1, 0, 0, {}, true, DType::kBF16};

  static QAT_HD float round(float w) { return bf16_value(bf16_bits(w)); }
};

}  // namespace qat::grid
