#pragma once

// Pieces that ggml's block layouts share: little-endian halves, 32 nibbles in 16 bytes, and four
// codes of two bits in one byte.

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"

namespace qat::grid {

/// value -> bytes[2], rounded to nearest even.
QAT_HD void put_f16(float value, uint8_t* bytes) {
  const uint16_t half = f16_bits(value);
  bytes[0] = static_cast<uint8_t>(half & 0xffU);
  bytes[1] = static_cast<uint8_t>(half >> 8);
}

/// The reverse of `put_f16`.
QAT_HD float get_f16(const uint8_t* bytes) {
  return f16_value(static_cast<uint16_t>(bytes[0] | (bytes[1] << 8)));
}

/// codes: int8[32] -> bytes[16]; byte j = element j in the low nibble, element j + 16 in the high one.
QAT_HD void pack_nibbles(const int8_t* codes, int code_min, uint8_t* bytes) {
  for (int j = 0; j < 16; ++j) {
    const int low = codes[j] - code_min;
    const int high = codes[j + 16] - code_min;
    bytes[j] = static_cast<uint8_t>(low | (high << 4));
  }
}

/// The reverse of `pack_nibbles`.
QAT_HD void unpack_nibbles(const uint8_t* bytes, int code_min, int8_t* codes) {
  for (int j = 0; j < 16; ++j) {
    codes[j] = static_cast<int8_t>((bytes[j] & 0xf) + code_min);
    codes[j + 16] = static_cast<int8_t>((bytes[j] >> 4) + code_min);
  }
}

/// codes[0], codes[step], codes[2 step], codes[3 step] -> one byte, low bits first.
QAT_HD uint8_t pack_two_bits(const int8_t* codes, int64_t step, int code_min) {
  int byte = 0;
  for (int k = 0; k < 4; ++k) byte |= (codes[k * step] - code_min) << (2 * k);
  return static_cast<uint8_t>(byte);
}

/// The reverse of `pack_two_bits`.
QAT_HD void unpack_two_bits(uint8_t byte, int8_t* codes, int64_t step, int code_min) {
  for (int k = 0; k < 4; ++k) codes[k * step] = static_cast<int8_t>(((byte >> (2 * k)) & 3) + code_min);
}

}  // namespace qat::grid
