#pragma once

// What the searches with AVX2 share: sums of integers, and the error of a block in the lanes of `ErrorSum`.
// Only sources compiled for AVX2 and F16C may include this; everything is forced inline (see avx2.hpp).

#include "grid/steps_avx2.hpp"
#include "qat/grid/search.hpp"

namespace qat::grid {

/// clamp of each lane; NaN becomes low.
QAT_HD __m256 clamp8(__m256 v, float low, float high) {
  return _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(low)), _mm256_set1_ps(high));
}

/// The sum of eight int32 lanes.
QAT_HD int64_t sum_lanes(__m256i v) {
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

/// The sums of eight vectors of eight int32 lanes, in order.
QAT_HD __m256i sum_each(const __m256i* v) {
  const __m256i ab = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i cd = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(ab, cd, 0x20), _mm256_permute2x128_si256(ab, cd, 0x31));
}

/// ErrorSum::total.
QAT_HD float total_of(__m256 lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/// decoded_error of at most kSearchChunk weights, from the block's steps for eight weights and for one.
template <class Wide, class Narrow>
QAT_HD float chunk_error(const Wide& wide, const Narrow& narrow, const float* w, int64_t n, float unit) {
  __m256 lanes = _mm256_setzero_ps();
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const Eight v = loaded(w + i);
    const __m256 error = _mm256_mul_ps((v - quantized(wide, v)).v[0], _mm256_set1_ps(unit));
    lanes = _mm256_add_ps(lanes, _mm256_mul_ps(error, error));
  }
  if (whole == n) return total_of(lanes);
  ErrorSum sum;
  _mm256_storeu_ps(sum.lanes, lanes);
  for (int64_t i = whole; i < n; ++i) sum.add(i, (w[i] - quantized(narrow, w[i])) * unit);
  return sum.total();
}

/// decoded_error of scales s, whose stored values are given.
template <class Codec>
QAT_HD double wide_error(const Codec& codec, const float* w, int64_t n, const float* s, const float* stored,
                         float unit) {
  const Steps<Codec, Eight> wide(codec, s, stored);
  const Steps<Codec, float> narrow(codec, s, stored);
  double total = 0.0;
  for (int64_t first = 0; first < n; first += kSearchChunk) {
    const int64_t count = n - first < kSearchChunk ? n - first : kSearchChunk;
    total += static_cast<double>(chunk_error(wide, narrow, w + first, count, unit));
  }
  return total;
}

}  // namespace qat::grid
