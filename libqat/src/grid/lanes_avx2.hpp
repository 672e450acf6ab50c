#pragma once

// 8 K floats side by side, for formulas as lanes.hpp describes them. Only sources compiled for AVX2 may
// include this; everything is forced inline (see avx2.hpp).

#include <immintrin.h>

#include "grid/avx2.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/lanes.hpp"

namespace qat::grid {

/// The outcome of a comparison, all bits of a lane set where it holds.
template <int K>
struct LaneMask {
  __m256 v[K];

  friend QAT_HD LaneMask operator&(LaneMask a, LaneMask b) {
    for (int k = 0; k < K; ++k) a.v[k] = _mm256_and_ps(a.v[k], b.v[k]);
    return a;
  }
  friend QAT_HD bool everywhere(LaneMask a) {
    for (int k = 1; k < K; ++k) a.v[0] = _mm256_and_ps(a.v[0], a.v[k]);
    return _mm256_movemask_ps(a.v[0]) == 0xff;
  }
};

template <int K>
struct Lanes {
  __m256 v[K];

  Lanes() = default;
  // NOLINTNEXTLINE(google-explicit-constructor): a constant beside lanes means that constant in each.
  QAT_HD Lanes(float value) {
    for (int k = 0; k < K; ++k) v[k] = _mm256_set1_ps(value);
  }

  template <class Function>
  static QAT_HD Lanes each(const Lanes& a, const Lanes& b, Function function) {
    Lanes result;
    for (int k = 0; k < K; ++k) result.v[k] = function(a.v[k], b.v[k]);
    return result;
  }
  template <int kPredicate>
  static QAT_HD LaneMask<K> compare(const Lanes& a, const Lanes& b) {
    LaneMask<K> mask;
    for (int k = 0; k < K; ++k) mask.v[k] = _mm256_cmp_ps(a.v[k], b.v[k], kPredicate);
    return mask;
  }

  friend QAT_HD void load_lanes(const float* from, Lanes* lanes) {
    for (int k = 0; k < K; ++k) lanes->v[k] = _mm256_loadu_ps(from + 8 * k);
  }
  /// Lane j: from[j * step].
  friend QAT_HD void gather_lanes(const float* from, int step, Lanes* lanes) {
    const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i index = _mm256_mullo_epi32(first, _mm256_set1_epi32(step));
    for (int k = 0; k < K; ++k) lanes->v[k] = _mm256_i32gather_ps(from + 8 * k * step, index, 4);
  }
  friend QAT_HD void put_lanes(const Lanes& lanes, float* to) {
    for (int k = 0; k < K; ++k) _mm256_storeu_ps(to + 8 * k, lanes.v[k]);
  }

  friend QAT_HD Lanes operator+(const Lanes& a, const Lanes& b) {
    return each(a, b, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); });
  }
  friend QAT_HD Lanes operator-(const Lanes& a, const Lanes& b) {
    return each(a, b, [](__m256 x, __m256 y) { return _mm256_sub_ps(x, y); });
  }
  friend QAT_HD Lanes operator*(const Lanes& a, const Lanes& b) {
    return each(a, b, [](__m256 x, __m256 y) { return _mm256_mul_ps(x, y); });
  }
  friend QAT_HD Lanes operator/(const Lanes& a, const Lanes& b) {
    return each(a, b, [](__m256 x, __m256 y) { return _mm256_div_ps(x, y); });
  }
  friend QAT_HD Lanes operator-(const Lanes& a) {
    return each(a, -0.0F, [](__m256 x, __m256 sign) { return _mm256_xor_ps(x, sign); });
  }
  friend QAT_HD LaneMask<K> operator<(const Lanes& a, const Lanes& b) { return compare<_CMP_LT_OQ>(a, b); }
  friend QAT_HD LaneMask<K> operator>(const Lanes& a, const Lanes& b) { return compare<_CMP_GT_OQ>(a, b); }
  friend QAT_HD LaneMask<K> operator<=(const Lanes& a, const Lanes& b) { return compare<_CMP_LE_OQ>(a, b); }
  friend QAT_HD LaneMask<K> operator>=(const Lanes& a, const Lanes& b) { return compare<_CMP_GE_OQ>(a, b); }
  friend QAT_HD LaneMask<K> operator==(const Lanes& a, const Lanes& b) { return compare<_CMP_EQ_OQ>(a, b); }
  friend QAT_HD LaneMask<K> operator!=(const Lanes& a, const Lanes& b) { return compare<_CMP_NEQ_UQ>(a, b); }

  friend QAT_HD Lanes select(const LaneMask<K>& which, const Lanes& yes, const Lanes& no) {
    Lanes result;
    for (int k = 0; k < K; ++k) result.v[k] = _mm256_blendv_ps(no.v[k], yes.v[k], which.v[k]);
    return result;
  }
  // The instructions are a < b ? a : b and a > b ? a : b, for zeros and NaNs too.
  friend QAT_HD Lanes lesser(const Lanes& a, const Lanes& b) {
    return each(a, b, [](__m256 x, __m256 y) { return _mm256_min_ps(x, y); });
  }
  friend QAT_HD Lanes greater(const Lanes& a, const Lanes& b) {
    return each(a, b, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
  }
  friend QAT_HD Lanes magnitude(const Lanes& a) {
    return each(a, -0.0F, [](__m256 x, __m256 sign) { return _mm256_andnot_ps(sign, x); });
  }
  friend QAT_HD Lanes square_root(const Lanes& a) {
    return each(a, a, [](__m256 x, __m256) { return _mm256_sqrt_ps(x); });
  }
  friend QAT_HD Lanes truncated(const Lanes& a) {
    return each(a, a, [](__m256 x, __m256) { return _mm256_cvtepi32_ps(_mm256_cvttps_epi32(x)); });
  }
  friend QAT_HD Lanes nearest_even(const Lanes& a) {
    return each(a, a, [](__m256 x, __m256) { return _mm256_cvtepi32_ps(_mm256_cvtps_epi32(x)); });
  }
  friend QAT_HD Lanes nearest_away(const Lanes& a) {
    return each(a, a, [](__m256 x, __m256) { return round_half_away8(x); });
  }
  /// Finite values only.
  friend QAT_HD Lanes round_value(DType dtype, const Lanes& a) {
    if (dtype == DType::kF32) return a;
    return each(a, a, [=](__m256 x, __m256) {
      return dtype == DType::kF16 ? round_value8<DType::kF16>(x) : round_value8<DType::kBF16>(x);
    });
  }
  friend QAT_HD Lanes ggml_code(const Lanes& a, int low, int high) {
    const __m256i least = _mm256_set1_epi32(low + 0x400000);
    const __m256i greatest = _mm256_set1_epi32(high + 0x400000);
    return each(a, 12582912.0F, [=](__m256 x, __m256 shift) {
      const __m256i sum = _mm256_castps_si256(_mm256_add_ps(x, shift));
      const __m256i fraction = _mm256_and_si256(sum, _mm256_set1_epi32(0x7fffff));
      const __m256i held = _mm256_min_epi32(_mm256_max_epi32(fraction, least), greatest);
      // The bits of shift + code, which is exact.
      const __m256i bits = _mm256_or_si256(held, _mm256_set1_epi32(0x4b000000));
      return _mm256_sub_ps(_mm256_castsi256_ps(bits), shift);
    });
  }
};

}  // namespace qat::grid
