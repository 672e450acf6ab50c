#include "qat/grid/pack.hpp"

namespace qat::grid {

void pack_codes(const int8_t* codes, int64_t n, int bits, int code_min, uint8_t* bytes) {
  uint32_t pending = 0;
  int held = 0;
  for (int64_t i = 0; i < n; ++i) {
    pending |= static_cast<uint32_t>(codes[i] - code_min) << held;
    held += bits;
    for (; held >= 8; held -= 8, pending >>= 8) *bytes++ = static_cast<uint8_t>(pending);
  }
  if (held > 0) *bytes = static_cast<uint8_t>(pending);
}

void unpack_codes(const uint8_t* bytes, int64_t n, int bits, int code_min, int8_t* codes) {
  const uint32_t mask = (1U << bits) - 1U;
  uint32_t pending = 0;
  int held = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (held < bits) {
      pending |= static_cast<uint32_t>(*bytes++) << held;
      held += 8;
    }
    codes[i] = static_cast<int8_t>(static_cast<int>(pending & mask) + code_min);
    pending >>= bits;
    held -= bits;
  }
}

}  // namespace qat::grid
