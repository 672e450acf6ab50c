#pragma once

// Pieces that ggml's blocks share: the weight that sets a signed scale, little-endian halves, 32 nibbles in
// 16 bytes, 32 codes of five bits in 20 bytes, four codes of two bits in one byte.

#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"

namespace qat::grid {

/// The first of the weights with the largest magnitude; +0 when all are zeros.
QAT_HD float first_of_largest(const float* w, int64_t n) {
  float found = 0.0F;
  for (int64_t i = 0; i < n; ++i) found = magnitude(w[i]) > magnitude(found) ? w[i] : found;
  return found;
}

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

/// codes: int8[32] -> bytes[20]; a little-endian u32 whose bit j is the fifth bit of element j, then the low
/// four bits as `pack_nibbles` has them.
QAT_HD void pack_five_bits(const int8_t* codes, int code_min, uint8_t* bytes) {
  for (int j = 0; j < 4; ++j) bytes[j] = 0;
  for (int j = 0; j < 16; ++j) {
    const int low = codes[j] - code_min;
    const int high = codes[j + 16] - code_min;
    bytes[j / 8] = static_cast<uint8_t>(bytes[j / 8] | ((low >> 4) << (j % 8)));
    bytes[2 + j / 8] = static_cast<uint8_t>(bytes[2 + j / 8] | ((high >> 4) << (j % 8)));
    bytes[4 + j] = static_cast<uint8_t>((low & 0xf) | ((high & 0xf) << 4));
  }
}

/// The reverse of `pack_five_bits`.
QAT_HD void unpack_five_bits(const uint8_t* bytes, int code_min, int8_t* codes) {
  unpack_nibbles(bytes + 4, code_min, codes);
  for (int i = 0; i < 32; ++i) {
    codes[i] = static_cast<int8_t>(codes[i] + (((bytes[i / 8] >> (i % 8)) & 1) << 4));
  }
}

/// 32 codes of 4 or 5 bits in ggml's order: `pack_nibbles`, or `pack_five_bits`.
template <int kBits>
QAT_HD void pack_halves(const int8_t* codes, int code_min, uint8_t* bytes) {
  if constexpr (kBits == 5) {
    pack_five_bits(codes, code_min, bytes);
  } else {
    pack_nibbles(codes, code_min, bytes);
  }
}

/// The reverse of `pack_halves`.
template <int kBits>
QAT_HD void unpack_halves(const uint8_t* bytes, int code_min, int8_t* codes) {
  if constexpr (kBits == 5) {
    unpack_five_bits(bytes, code_min, codes);
  } else {
    unpack_nibbles(bytes, code_min, codes);
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
