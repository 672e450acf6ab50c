// fake_quantize of the integer families with AVX2 and F16C, equal to the scalar codecs bit for bit. Compiled
// with -mavx2 -mf16c and without -mfma. Everything here is in the unnamed namespace or forced inline.

#include "grid/avx2.hpp"
#include "grid/kernels_avx2.hpp"
#include "qat/grid/int_symmetric.hpp"

namespace qat::grid {
namespace {

/// The block that most models have; its loops unroll. Others go by the number that the codec holds.
constexpr int64_t kUnrolled = 32;

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

template <DType kDequant, class Out>
QAT_HD void symmetric_block(const IntSymmetric& codec, const float* w, int64_t n, Out* out, Seen& seen) {
  const __m256i largest = spread_max(largest_lanes(w, n));
  seen.largest = _mm256_max_epi32(seen.largest, largest);
  const float s = codec.scale_of(float_of(first_lane(largest)));
  float stored;
  seen.overflow |= codec.store(&s, &stored) != Status::kOk;
  const IntSymmetric::Encoder e = codec.encoder(&s);
  const __m256 divisor = _mm256_set1_ps(e.divisor);
  const __m256 low = _mm256_set1_ps(codec.low);
  const __m256 high = _mm256_set1_ps(codec.high);
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 ratio = _mm256_div_ps(_mm256_loadu_ps(w + i), divisor);
    const __m256i code = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(ratio, low), high));
    const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(stored));
    put8(out + i, round_value8<kDequant>(product));
  }
  for (int64_t i = whole; i < n; ++i) put1(out + i, codec.decode(codec.encode(w[i], e), &stored));
}

template <DType kDequant, class Out>
Status symmetric_row(const void* codec, const float* w, int64_t n, Out* out) {
  const auto& symmetric = *static_cast<const IntSymmetric*>(codec);
  Seen seen;
  if (symmetric.block == kUnrolled) {
    for (int64_t i = 0; i < n; i += kUnrolled) {
      symmetric_block<kDequant>(symmetric, w + i, kUnrolled, out + i, seen);
    }
    return seen.status();
  }
  const int64_t step = symmetric.block > 0 ? symmetric.block : n;
  for (int64_t i = 0; i < n; i += step) symmetric_block<kDequant>(symmetric, w + i, step, out + i, seen);
  return seen.status();
}

template <DType kDequant>
constexpr RowKernels symmetric_kernels() {
  return {symmetric_row<kDequant, float>, symmetric_row<kDequant, uint16_t>, nullptr, nullptr};
}

}  // namespace

constinit const std::array<RowKernels, 3> kAvx2Symmetric{
    symmetric_kernels<DType::kF32>(), symmetric_kernels<DType::kF16>(), symmetric_kernels<DType::kBF16>()};

}  // namespace qat::grid
