#pragma once

// Blocks with AVX2 and F16C by the formulas of steps.hpp, and where a kernel puts what it finds. Only sources
// compiled for them may include this; everything is forced inline (see avx2.hpp).

#include <algorithm>
#include <concepts>

#include "grid/lanes_avx2.hpp"
#include "qat/grid/steps.hpp"

namespace qat::grid {

using Eight = Lanes<1>;

QAT_HD Eight loaded(const float* w) {
  Eight v;
  load_lanes(w, &v);
  return v;
}

/// The same of eight weights, by their codes: half as many instructions.
QAT_HD Eight e2m1_level(Eight w, Eight scale) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  const __m256 size = _mm256_andnot_ps(sign, w.v[0]);
  __m256i code = _mm256_setzero_si256();
  for (const float border : {0.25F, 0.75F, 1.25F, 1.75F, 2.5F, 3.5F, 5.0F}) {
    const __m256 at = _mm256_mul_ps(_mm256_set1_ps(border), scale.v[0]);
    code = _mm256_sub_epi32(code, _mm256_castps_si256(_mm256_cmp_ps(size, at, _CMP_GT_OQ)));
  }
  const __m256 values = _mm256_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F);
  const __m256 nonzero = _mm256_castsi256_ps(_mm256_cmpgt_epi32(code, _mm256_setzero_si256()));
  const __m256 signs = _mm256_and_ps(_mm256_and_ps(w.v[0], sign), nonzero);
  Eight level;
  level.v[0] = _mm256_or_ps(_mm256_permutevar8x32_ps(values, code), signs);
  return level;
}

/// w_hat of a weight, or of eight.
template <class Steps, class F>
QAT_HD F quantized(const Steps& steps, F w) {
  return steps.weight(steps.level(w, steps.position(w)));
}

/// A codec whose constants are known when it is compiled.
template <class Codec>
concept Constant = requires { Codec::kInfo; };

/// Whether all scales are stored as fp16.
template <class Codec>
inline constexpr bool kHalves = [] {
  if constexpr (Constant<Codec>) {
    return std::ranges::all_of(Codec::kInfo.fields, [](const Field& f) { return f.dtype == DType::kF16; });
  }
  return false;
}();

/// P.
template <class Codec>
inline constexpr int kStored = [] {
  int total = std::same_as<Codec, IntSymmetric> ? 1 : 2;
  if constexpr (Constant<Codec>) {
    total = 0;
    for (const Field& field : Codec::kInfo.fields) total += field.count;
  }
  return total;
}();

template <class Codec>
QAT_HD Codec codec_of(const void* object) {
  if constexpr (Constant<Codec>) {
    return Codec{};
  } else {
    return *static_cast<const Codec*>(object);
  }
}

/// B.
template <class Codec>
QAT_HD int64_t block_of(const Codec& codec, int64_t n) {
  if constexpr (Constant<Codec>) {
    return Codec::kInfo.block;
  } else {
    return codec.block > 0 ? codec.block : n;
  }
}

/// codec.store; halves by the processor's own conversion.
template <class Codec>
QAT_HD Status store_wide(const Codec& codec, const float* s, float* stored) {
  if constexpr (kHalves<Codec>) {
    Status status = Status::kOk;
    for (int i = 0; i < kStored<Codec>; ++i) {
      stored[i] = through_f16(s[i]);
      const bool nan = s[i] != s[i];
      const Status one = is_finite(stored[i]) ? Status::kOk : Status::kOverflow;
      status = worse(status, nan ? Status::kNotFinite : one);
    }
    return status;
  } else {
    return codec.store(s, stored);
  }
}

/// A block through its codec with scales s.
template <class Codec, class Out>
QAT_HD void put_block(const Codec& codec, const float* w, int64_t n, const float* s, const float* stored,
                      Out* out) {
  const Steps<Codec, Eight> wide(codec, s, stored);
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8) put8(out + i, quantized(wide, loaded(w + i)).v[0]);
  if (whole == n) return;
  const Steps<Codec, float> narrow(codec, s, stored);
  for (int64_t i = whole; i < n; ++i) put1(out + i, quantized(narrow, w[i]));
}

/// Where a kernel that finds scales puts a row: its weights, decoded with them.
template <class Out>
struct WeightSink {
  Out* out;

  /// The block of n weights from weight i on.
  template <class Codec>
  QAT_HD void put(const Codec& codec, const float* w, int64_t i, int64_t n, const float* s,
                  Seen& seen) const {
    float stored[kStored<Codec>];
    seen.overflow |= store_wide(codec, s, stored) != Status::kOk;
    put_block(codec, w + i, n, s, stored, out + i);
  }
};

/// The scales themselves, whether or not a file can hold them.
struct ScaleSink {
  float* out;

  template <class Codec>
  QAT_HD void put(const Codec&, const float*, int64_t i, int64_t n, const float* s, Seen&) const {
    for (int p = 0; p < kStored<Codec>; ++p) out[i / n * kStored<Codec> + p] = s[p];
  }
};

}  // namespace qat::grid
