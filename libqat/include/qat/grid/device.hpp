#pragma once

// What every codec is written with: functions that compile for the host and, under nvcc, for the device.

#include <cstdint>
#include <cstring>

/// Host and device function, always inlined. That is part of correctness here: the AVX2 source includes the
/// codecs too, and an out-of-line copy compiled there could be linked in for CPUs that lack AVX2.
#if defined(__CUDACC__)
#define QAT_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define QAT_HD __forceinline
#else
#define QAT_HD inline __attribute__((always_inline))
#endif

namespace qat::grid {

/// Bit pattern of a float32 without its sign from which on it is an infinity or a NaN.
inline constexpr uint32_t kInfinityBits = 0x7f800000U;

/// The bit pattern of a float.
QAT_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/// The float of a bit pattern.
QAT_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/// The bit pattern of |value|.
QAT_HD uint32_t magnitude_bits(float value) {
  return bits_of(value) & 0x7fffffffU;
}

/// |value|, NaN included.
QAT_HD float magnitude(float value) {
  return float_of(magnitude_bits(value));
}

/// Neither infinite nor NaN, whatever the compiler assumes of floats.
QAT_HD bool is_finite(float value) {
  return magnitude_bits(value) < kInfinityBits;
}

/// `is_finite` of all n values.
QAT_HD bool all_finite(const float* w, int64_t n) {
  uint32_t worst = 0;
  for (int64_t i = 0; i < n; ++i) worst = magnitude_bits(w[i]) > worst ? magnitude_bits(w[i]) : worst;
  return worst < kInfinityBits;
}

/// The largest |w[i]|; 0 for n = 0.
QAT_HD float absolute_maximum(const float* w, int64_t n) {
  float largest = 0.0F;
  for (int64_t i = 0; i < n; ++i) largest = magnitude(w[i]) > largest ? magnitude(w[i]) : largest;
  return largest;
}

/// Into [low, high]; NaN becomes low.
QAT_HD float clamp(float value, float low, float high) {
  const float raised = value > low ? value : low;
  return raised < high ? raised : high;
}

/// Nearest integer, ties to even, for |value| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
QAT_HD int round_half_even(float value) {
  constexpr float kShift = 12582912.0F;
  return static_cast<int>((value + kShift) - kShift);
}

/// The float below 1/2. Added before truncation it rounds ties up; 1/2 itself would also round this float up.
inline constexpr float kAlmostHalf = 0.5F - 0x1p-25F;

/// Nearest integer, ties away from zero (C's roundf), for |value| < 2^22.
QAT_HD int round_half_away(float value) {
  const uint32_t sign = bits_of(value) & 0x80000000U;
  return static_cast<int>(value + float_of(sign | bits_of(kAlmostHalf)));
}

/// 1 / scale as ggml computes it: 0 for a scale of 0. Infinite when |scale| <= 2^-128.
QAT_HD float ggml_inverse(float scale) {
  return scale != 0.0F ? 1.0F / scale : 0.0F;
}

/// True when `value` lies in [low, high]. The borders are widened by 2^-20 of themselves, more than the
/// rounding of a scale and of its reciprocal can add up to, so that the weight which a scale was chosen from
/// is inside.
QAT_HD bool inside(float value, int low, int high) {
  constexpr float kWiden = 1.0F + 0x1p-20F;
  return value >= static_cast<float>(low) * kWiden && value <= static_cast<float>(high) * kWiden;
}

}  // namespace qat::grid
