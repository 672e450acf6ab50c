#pragma once

// Dense packing of codes: one little-endian bit stream per row, least significant bits first, each code
// stored as the unsigned number code - code_min. Rows start on a byte. This is libqat's checkpoint layout,
// and the bit order of compressed-tensors' `weight_packed` (3 bits: since its releases of mid-2026; before,
// no code crossed a 32-bit word) and of Gemma's mobile format.

#include <cstdint>

namespace qat::grid {

/// Bytes of n codes of `bits` bits (1..8), rounded up.
constexpr int64_t packed_bytes(int64_t n, int bits) noexcept {
  return (n * bits + 7) / 8;
}

/// codes: int8[n] -> bytes: uint8[packed_bytes(n, bits)]; unused high bits of the last byte are 0.
void pack_codes(const int8_t* codes, int64_t n, int bits, int code_min, uint8_t* bytes);

/// The reverse. Values beyond code_max are returned as they stand: readers check them.
void unpack_codes(const uint8_t* bytes, int64_t n, int bits, int code_min, int8_t* codes);

}  // namespace qat::grid
