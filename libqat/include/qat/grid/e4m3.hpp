#pragma once

// e4m3 ("fn": no infinities): sign, 4 exponent bits of bias 7, 3 fraction bits; the largest number is 448.
// (OCP 8-bit Floating Point Specification v1.0; torch.float8_e4m3fn)

#include "qat/grid/device.hpp"

namespace qat::grid {

inline constexpr float kE4M3Max = 448.0F;

/// byte -> float32, exact; 0x7f and 0xff are NaN.
QAT_HD float e4m3_value(uint8_t byte) {
  const uint32_t sign = (byte & 0x80U) << 24;
  const uint32_t exponent = (byte >> 3) & 0xfU;
  const uint32_t fraction = byte & 7U;
  if (exponent == 15 && fraction == 7) return float_of(sign | 0x7fc00000U);
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-9F));
  return float_of(sign | ((exponent + 120U) << 23) | (fraction << 20));
}

/// float32 -> e4m3, nearest even, subnormals kept. Magnitudes that round above 448, infinities and NaN give
/// NaN.
QAT_HD uint8_t e4m3_bits(float value) {
  const uint32_t sign = (bits_of(value) >> 24) & 0x80U;
  const uint32_t bits = magnitude_bits(value);
  if (bits > bits_of(464.0F)) return static_cast<uint8_t>(sign | 0x7fU);
  if (bits < bits_of(0x1p-6F)) {
    // In [2^14, 2^15) floats are 2^-9 apart, as subnormals are: the addition rounds to them.
    const uint32_t sum = bits_of(float_of(bits) + 0x1p14F);
    return static_cast<uint8_t>(sign | (sum - bits_of(0x1p14F)));
  }
  // 464 is the tie between 448 and 480; 448's last bit is even, so it goes down with the others.
  const uint32_t rounded = bits + 0x7ffffU + ((bits >> 20) & 1U);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120U << 3)));
}

}  // namespace qat::grid
