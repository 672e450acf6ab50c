// fake_quantize with AVX2 and F16C, equal to the scalar codecs bit for bit. Compiled with -mavx2 -mf16c and
// without -mfma: a fused multiply-add would move ties. Everything here is forced inline or in the unnamed
// namespace, so that no AVX2 copy of a shared function can reach other objects.

#include "grid/kernels_avx2.hpp"

#include "grid/search_avx2.hpp"
#include "qat/grid/mxfp4.hpp"
#include "qat/grid/nvfp4.hpp"
#include "qat/grid/offset_block.hpp"
#include "qat/grid/q2_0.hpp"
#include "qat/grid/q8_0.hpp"
#include "qat/grid/signed_block.hpp"
#include "qat/grid/tq1_0.hpp"
#include "qat/grid/tq2_0.hpp"

namespace qat::grid {
namespace {

// In the block kernels a dynamic scale bounds w / d, so that only the clamps written here can ever act;
// codes pass through int32, which turns a -0 into the scalar path's +0.

/// q4_0 and q5_0: d = m / -2^(bits - 1), codes shifted up by as much.
template <class Codec>
struct SignedKernel {
  template <class Out>
  static QAT_HD void run(const float* w, Out* out, Seen& seen) {
    constexpr int kShift = -Codec::kInfo.code_min;
    const Block32 block = Block32::load(w);
    const __m256i largest = block.largest();
    seen.largest = _mm256_max_epi32(seen.largest, largest);
    // + 0: an all-zero block has m = +0. The division is by a power of two: exact but for subnormals, rounded
    // once either way.
    const float d = (w[block.first_with(largest)] + 0.0F) / static_cast<float>(-kShift);
    const typename Codec::Encoder e = Codec::encoder(&d);
    const float stored = through_f16(d);
    seen.overflow |= !is_finite(stored);
    const __m256 most = _mm256_set1_ps(static_cast<float>(2 * kShift - 1));
    for (int k = 0; k < 4; ++k) {
      const __m256 scaled = _mm256_mul_ps(block.v[k], _mm256_set1_ps(e.inverse));
      const __m256 shifted = _mm256_min_ps(_mm256_add_ps(scaled, _mm256_set1_ps(e.shift)), most);
      const __m256i code = _mm256_sub_epi32(_mm256_cvttps_epi32(shifted), _mm256_set1_epi32(kShift));
      put8(out + 8 * k, _mm256_mul_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(stored)));
    }
  }
};

/// q4_1 and q5_1: a scale and a minimum.
template <class Codec>
struct OffsetKernel {
  template <class Out>
  static QAT_HD void run(const float* w, Out* out, Seen& seen) {
    constexpr auto kMost = static_cast<float>(Codec::kInfo.code_max);
    const Block32 block = Block32::load(w);
    seen.largest = _mm256_max_epi32(seen.largest, block.largest_lanes());
    const __m256 low =
        _mm256_min_ps(_mm256_min_ps(block.v[0], block.v[1]), _mm256_min_ps(block.v[2], block.v[3]));
    const __m256 high =
        _mm256_max_ps(_mm256_max_ps(block.v[0], block.v[1]), _mm256_max_ps(block.v[2], block.v[3]));
    const float minimum = least_lane(low);
    // + 0: a difference of zeros of opposite signs would be -0, while ggml subtracts the first zero from
    // itself.
    const float s[2] = {(greatest_lane(high) - minimum + 0.0F) / kMost, minimum};
    const typename Codec::Encoder e = Codec::encoder(s);
    const float stored[2] = {through_f16(s[0]), through_f16(s[1])};
    seen.overflow |= !is_finite(stored[0]) || !is_finite(stored[1]);
    for (int k = 0; k < 4; ++k) {
      const __m256 above = _mm256_sub_ps(block.v[k], _mm256_set1_ps(e.minimum));
      const __m256 scaled = _mm256_mul_ps(above, _mm256_set1_ps(e.inverse));
      const __m256 shifted =
          _mm256_min_ps(_mm256_add_ps(scaled, _mm256_set1_ps(0.5F)), _mm256_set1_ps(kMost));
      const __m256 code = _mm256_cvtepi32_ps(_mm256_cvttps_epi32(shifted));
      const __m256 product = _mm256_mul_ps(code, _mm256_set1_ps(stored[0]));
      put8(out + 8 * k, _mm256_add_ps(product, _mm256_set1_ps(stored[1])));
    }
  }
};

/// q8_0, q2_0, tq1_0 and tq2_0: the scale is max|w| / kLevels, ties go away from zero.
template <class Codec, int kLevels>
struct MaximumKernel {
  template <class Out>
  static QAT_HD void run(const float* w, Out* out, Seen& seen) {
    const __m256i largest = spread_max(largest_lanes(w, Codec::kInfo.block));
    seen.largest = _mm256_max_epi32(seen.largest, largest);
    const float d = float_of(first_lane(largest)) / static_cast<float>(kLevels);
    const typename Codec::Encoder e = Codec::encoder(&d);
    const float stored = through_f16(d);
    seen.overflow |= !is_finite(stored);
    for (int64_t i = 0; i < Codec::kInfo.block; i += 8) {
      __m256 position = _mm256_mul_ps(_mm256_loadu_ps(w + i), _mm256_set1_ps(e.inverse));
      if constexpr (requires { e.shift; }) position = _mm256_add_ps(position, _mm256_set1_ps(e.shift));
      put8(out + i, _mm256_mul_ps(round_half_away8(position), _mm256_set1_ps(stored)));
    }
  }
};

/// `BestScale` for a block of whole vectors.
template <class Codec>
struct WideBestScale {
  const float* w;
  float unit;
  float scale;
  double error;

  QAT_HD WideBestScale(const float* weights, int64_t, float largest, float s)
      : w(weights), unit(error_unit(largest)), scale(s), error(error_of(s)) {}

  QAT_HD double error_of(float s) const {
    float stored;
    if (Codec::store(&s, &stored) != Status::kOk) return static_cast<double>(float_of(kInfinityBits));
    return wide_error(Codec{}, w, Codec::kInfo.block, &s, &stored, unit);
  }

  QAT_HD void offer(float s) {
    const double offered = error_of(s);
    if (offered >= error) return;
    error = offered;
    scale = s;
  }
};

/// mxfp4 and nvfp4.
template <class Codec, ScaleRule kRule>
struct E2M1Kernel {
  template <class Sink>
  static QAT_HD void run(const float* w, int64_t i, Sink sink, Seen& seen) {
    const __m256i largest_bits = spread_max(largest_lanes(w + i, Codec::kInfo.block));
    seen.largest = _mm256_max_epi32(seen.largest, largest_bits);
    const float largest = float_of(first_lane(largest_bits));
    if (!is_finite(largest)) return;
    float s = Codec::scale_of(largest);
    if constexpr (kRule == ScaleRule::kSearch) {
      s = search_e2m1<Codec, WideBestScale<Codec>>(w + i, Codec::kInfo.block, largest, s);
    }
    sink.put(Codec{}, w, i, Codec::kInfo.block, &s, seen);
  }

  template <class Sink>
  static QAT_HD Status row(const float* w, int64_t n, Sink sink) {
    Seen seen;
    for (int64_t i = 0; i < n; i += Codec::kInfo.block) run(w, i, sink, seen);
    return seen.status();
  }

  template <class Out>
  static Status weights(const void*, const float* w, int64_t n, Out* out) {
    return row(w, n, WeightSink<Out>{out});
  }

  static Status scales(const void*, const float* w, int64_t n, float* s) { return row(w, n, ScaleSink{s}); }
};

/// Runs a kernel on every block of a row.
template <class Codec, class Kernel, class Out>
Status block_row(const void*, const float* w, int64_t n, Out* out) {
  Seen seen;
  for (int64_t i = 0; i < n; i += Codec::kInfo.block) Kernel::run(w + i, out + i, seen);
  return seen.status();
}

template <class Codec, class Kernel>
constexpr NamedKernels blocks() {
  return {Codec::kInfo.name, {block_row<Codec, Kernel, float>, block_row<Codec, Kernel, uint16_t>}};
}

template <class Codec>
constexpr NamedKernels e2m1_blocks() {
  using Rule = E2M1Kernel<Codec, ScaleRule::kReference>;
  using Search = E2M1Kernel<Codec, ScaleRule::kSearch>;
  return {Codec::kInfo.name,
          {Rule::template weights<float>, Rule::template weights<uint16_t>, Search::template weights<float>,
           Search::template weights<uint16_t>, Rule::scales, Search::scales}};
}

}  // namespace

constinit const std::array<NamedKernels, 10> kAvx2Kernels{
    {blocks<Q4_0, SignedKernel<Q4_0>>(), blocks<Q4_1, OffsetKernel<Q4_1>>(),
     blocks<Q5_0, SignedKernel<Q5_0>>(), blocks<Q5_1, OffsetKernel<Q5_1>>(),
     blocks<Q8_0, MaximumKernel<Q8_0, 127>>(), blocks<Q2_0, MaximumKernel<Q2_0, 1>>(),
     blocks<TQ1_0, MaximumKernel<TQ1_0, 1>>(), blocks<TQ2_0, MaximumKernel<TQ2_0, 1>>(), e2m1_blocks<Mxfp4>(),
     e2m1_blocks<Nvfp4>()}};

}  // namespace qat::grid
