#pragma once

// Options of the integer grids: what a scale may be, and the type in which a consumer computes weights.

#include "qat/grid/bf16.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/f16.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

/// The numbers that a scale is rounded to; the option behind "@" in a grid's name.
enum class ScaleGrid {
  kF32,      ///< fp32: any float32
  kF16,      ///< fp16: nearest even, subnormals kept
  kBF16,     ///< bf16: nearest even
  kBF16F16,  ///< bf16_fp16: rounded to bf16, then to fp16, and exact in both
  kPow2,     ///< pow2: the nearest power of two, 1.5 * 2^k goes up; below 2^-127 zero
};

/// s, rounded to that grid. Beyond fp16's range fp16 and bf16_fp16 give an infinity.
QAT_HD float round_scale(ScaleGrid grid, float s) {
  switch (grid) {
    case ScaleGrid::kF32:
      return s;
    case ScaleGrid::kF16:
      return f16_value(f16_bits(s));
    case ScaleGrid::kBF16:
      return bf16_value(bf16_bits(s));
    case ScaleGrid::kBF16F16:
      return f16_value(f16_bits(bf16_value(bf16_bits(s))));
    case ScaleGrid::kPow2:
      // Half of the fraction's range carries into the exponent; a NaN stays one.
      return s == s ? float_of((bits_of(s) + 0x400000U) & 0xff800000U) : s;
  }
  return s;
}

/// A product or sum as a consumer that computes in `dtype` (kF32, kF16 or kBF16) holds it, nearest even.
QAT_HD float round_value(DType dtype, float value) {
  if (dtype == DType::kF16) return f16_value(f16_bits(value));
  if (dtype == DType::kBF16) return bf16_value(bf16_bits(value));
  return value;
}

/// The largest magnitude that a decoded weight of that dtype may have. Float32 weights may become bfloat16
/// ones in a matmul, so it is bfloat16's for them too.
QAT_HD float largest_value(DType dtype) {
  return dtype == DType::kF16 ? 65504.0F : kBf16Max;
}

}  // namespace qat::grid
