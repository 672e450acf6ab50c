#pragma once

// What kernels for AVX2 and F16C share. Only sources compiled for them may include this. Everything is forced
// inline, so that no AVX2 copy of a function can reach other objects.

#include <immintrin.h>

#include "qat/grid/bf16.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/grid.hpp"

namespace qat::grid {

QAT_HD __m256i magnitude_bits8(__m256 v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

/// The largest of eight int32 lanes, in every lane.
QAT_HD __m256i spread_max(__m256i v) {
  v = _mm256_max_epi32(v, _mm256_permute2x128_si256(v, v, 1));
  v = _mm256_max_epi32(v, _mm256_shuffle_epi32(v, 0x4e));
  return _mm256_max_epi32(v, _mm256_shuffle_epi32(v, 0xb1));
}

QAT_HD uint32_t first_lane(__m256i v) {
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(v)));
}

QAT_HD float least_lane(__m256 v) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}

QAT_HD float greatest_lane(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

QAT_HD float through_f16(float value) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
}

QAT_HD void put8(float* out, __m256 v) {
  _mm256_storeu_ps(out, v);
}

/// Finite values only.
QAT_HD void put8(uint16_t* out, __m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i halves = _mm256_srli_epi32(sum, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

QAT_HD void put1(float* out, float value) {
  *out = value;
}
QAT_HD void put1(uint16_t* out, float value) {
  *out = bf16_bits(value);
}

/// `round_half_away` of each lane, as floats (never -0).
QAT_HD __m256 round_half_away8(__m256 v) {
  const __m256 nudge = _mm256_or_ps(_mm256_and_ps(v, _mm256_set1_ps(-0.0F)), _mm256_set1_ps(kAlmostHalf));
  return _mm256_cvtepi32_ps(_mm256_cvttps_epi32(_mm256_add_ps(v, nudge)));
}

/// `round_value` of eight finite values.
template <DType kDequant>
QAT_HD __m256 round_value8(__m256 v) {
  if constexpr (kDequant == DType::kF16) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else if constexpr (kDequant == DType::kBF16) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000U))));
  } else {
    return v;
  }
}

/// A block of 32 weights in registers.
struct Block32 {
  __m256 v[4];

  static QAT_HD Block32 load(const float* w) {
    return {{_mm256_loadu_ps(w), _mm256_loadu_ps(w + 8), _mm256_loadu_ps(w + 16), _mm256_loadu_ps(w + 24)}};
  }

  /// Bit patterns of the largest magnitudes, lane by lane; a NaN or an infinity beats every finite value.
  QAT_HD __m256i largest_lanes() const {
    const __m256i a = _mm256_max_epi32(magnitude_bits8(v[0]), magnitude_bits8(v[1]));
    const __m256i b = _mm256_max_epi32(magnitude_bits8(v[2]), magnitude_bits8(v[3]));
    return _mm256_max_epi32(a, b);
  }

  /// The largest of them, in every lane.
  QAT_HD __m256i largest() const { return spread_max(largest_lanes()); }

  /// Index of the first weight whose magnitude has that bit pattern.
  QAT_HD int first_with(__m256i pattern) const {
    uint32_t mask = 0;
    for (int k = 0; k < 4; ++k) {
      const __m256i equal = _mm256_cmpeq_epi32(magnitude_bits8(v[k]), pattern);
      mask |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal))) << (8 * k);
    }
    return __builtin_ctz(mask);
  }
};

/// What a row has shown so far. Kernels finish the row before they look at it: errors are rare.
struct Seen {
  __m256i largest = _mm256_setzero_si256();
  bool overflow = false;

  QAT_HD Status status() const {
    if (first_lane(spread_max(largest)) >= kInfinityBits) return Status::kNotFinite;
    return overflow ? Status::kOverflow : Status::kOk;
  }
};

/// The largest |w| of n weights, as bit patterns in eight lanes.
QAT_HD __m256i largest_lanes(const float* w, int64_t n) {
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) largest = _mm256_max_epi32(largest, Block32::load(w + i).largest_lanes());
  for (; i + 8 <= n; i += 8) largest = _mm256_max_epi32(largest, magnitude_bits8(_mm256_loadu_ps(w + i)));
  for (; i < n; ++i) {
    largest = _mm256_max_epi32(largest, _mm256_set1_epi32(static_cast<int>(magnitude_bits(w[i]))));
  }
  return largest;
}

}  // namespace qat::grid
