#pragma once

// e8m0: an exponent and nothing else, the block scale of the OCP MX formats. (OCP Microscaling Formats v1.0,
// section 5.4.1)

#include "qat/grid/device.hpp"

namespace qat::grid {

/// byte -> 2^(byte - 127), exact; 255 is NaN.
QAT_HD float e8m0_value(uint8_t byte) {
  if (byte == 255) return float_of(0x7fc00000U);
  return byte == 0 ? 0x1p-127F : float_of(static_cast<uint32_t>(byte) << 23);
}

/// The byte of a power of two from 2^-127 to 2^127; of any other positive number, the power of two below it.
/// NaN, infinities, zero and negative numbers give 255.
QAT_HD uint8_t e8m0_bits(float value) {
  if (!(value > 0.0F) || !is_finite(value)) return 255;
  return static_cast<uint8_t>(bits_of(value) >> 23);
}

}  // namespace qat::grid
