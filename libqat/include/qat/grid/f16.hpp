#pragma once

// f16: IEEE half precision, rounded to nearest, ties to even. Scales of the ggml grids are stored in it.

#include "qat/grid/device.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// float32 -> IEEE half, nearest even, subnormals kept. From 65520 on the result is an infinity. A NaN keeps
/// the upper bits of its payload, so that every half survives the way through float32.
QAT_HD uint16_t f16_bits(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > kInfinityBits) {
    const uint32_t payload = (magnitude >> 13) & 0x3ffU;
    return static_cast<uint16_t>(sign | 0x7c00U | (payload != 0 ? payload : 0x200U));
  }
  if (magnitude >= bits_of(65520.0F)) return static_cast<uint16_t>(sign | 0x7c00U);
  if (magnitude < bits_of(0x1p-14F)) {
    // In [0.5, 1) floats are 2^-24 apart, as half subnormals are: the addition rounds to them.
    const uint32_t sum = bits_of(float_of(magnitude) + 0.5F);
    return static_cast<uint16_t>(sign | (sum - bits_of(0.5F)));
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

/// IEEE half -> float32, exact.
QAT_HD float f16_value(uint16_t half) {
  const uint32_t sign = (half & 0x8000U) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fU;
  const uint32_t fraction = half & 0x3ffU;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return float_of(sign | bits_of(magnitude));
  }
  if (exponent == 31) return float_of(sign | kInfinityBits | (fraction << 13));
  return float_of(sign | ((exponent + 112U) << 23) | (fraction << 13));
}

/// A NaN outranks an overflow.
QAT_HD Status worse(Status a, Status b) {
  return a == Status::kNotFinite || b == Status::kOk ? a : b;
}

/// A scale parameter as an fp16 field holds it.
QAT_HD Status store_f16(float s, float* stored) {
  *stored = f16_value(f16_bits(s));
  if (s != s) return Status::kNotFinite;
  return is_finite(*stored) ? Status::kOk : Status::kOverflow;
}

struct F16 {
  static constexpr Info kInfo{"f16", 16, 1, 0, 0, {}, true, DType::kF16};

  static QAT_HD float round(float w) { return f16_value(f16_bits(w)); }
};

}  // namespace qat::grid
