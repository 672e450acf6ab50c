// fake_quantize of the integer families with AVX2 and F16C, equal to the scalar codecs bit for bit. Compiled
// with -mavx2 -mf16c and without -mfma. Everything here is in the unnamed namespace or forced inline.

#include "grid/avx2.hpp"
#include "grid/kernels_avx2.hpp"
#include "qat/grid/int_asymmetric.hpp"
#include "qat/grid/int_symmetric.hpp"
#include "qat/grid/mlx_affine.hpp"

namespace qat::grid {
namespace {

/// The nearest integer of each lane within [low, high].
QAT_HD __m256i code8(__m256 position, __m256 low, __m256 high) {
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(position, low), high));
}

/// Least and greatest of n weights.
struct Ends {
  float least;
  float greatest;
};

/// Notes in `seen` whether all are finite; the ends of others are unspecified.
QAT_HD Ends ends_of(const float* w, int64_t n, Seen& seen) {
  __m256 least = _mm256_set1_ps(w[0]);
  __m256 greatest = least;
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 v = _mm256_loadu_ps(w + i);
    least = _mm256_min_ps(least, v);
    greatest = _mm256_max_ps(greatest, v);
    seen.largest = _mm256_max_epi32(seen.largest, magnitude_bits8(v));
  }
  for (int64_t i = whole; i < n; ++i) {
    least = _mm256_min_ps(least, _mm256_set1_ps(w[i]));
    greatest = _mm256_max_ps(greatest, _mm256_set1_ps(w[i]));
    seen.largest = _mm256_max_epi32(seen.largest, magnitude_bits8(_mm256_set1_ps(w[i])));
  }
  return {least_lane(least), greatest_lane(greatest)};
}

/// Codes and weights of a block of each family, from its scales. Kernel::prepare notes in `seen` what the
/// block shows; Kernel::value is the weight of each lane.
template <DType kType>
struct SymmetricKernel {
  using Codec = IntSymmetric;
  __m256 divisor, stored, low, high;

  static QAT_HD void scales(const Codec& codec, const float* w, int64_t n, float* s, Seen& seen) {
    const __m256i largest = spread_max(largest_lanes(w, n));
    seen.largest = _mm256_max_epi32(seen.largest, largest);
    s[0] = codec.scale_of(float_of(first_lane(largest)));
  }

  QAT_HD SymmetricKernel(const Codec& codec, const Codec::Encoder& e, const float* s)
      : divisor(_mm256_set1_ps(e.divisor)),
        stored(_mm256_set1_ps(s[0])),
        low(_mm256_set1_ps(codec.low)),
        high(_mm256_set1_ps(codec.high)) {}

  QAT_HD __m256 value(__m256 w) const {
    const __m256i code = code8(_mm256_div_ps(w, divisor), low, high);
    return round_value8<kType>(_mm256_mul_ps(_mm256_cvtepi32_ps(code), stored));
  }
};

template <DType kType>
struct AsymmetricKernel {
  using Codec = IntAsymmetric;
  __m256 divisor, zero, stored, low, high;

  static QAT_HD void scales(const Codec& codec, const float* w, int64_t n, float* s, Seen& seen) {
    const Ends ends = ends_of(w, n, seen);
    codec.scales_of(ends.least, ends.greatest, s);
  }

  QAT_HD AsymmetricKernel(const Codec& codec, const Codec::Encoder& e, const float* s)
      : divisor(_mm256_set1_ps(e.divisor)),
        zero(_mm256_set1_ps(s[1])),
        stored(_mm256_set1_ps(s[0])),
        low(_mm256_set1_ps(codec.low)),
        high(_mm256_set1_ps(codec.high)) {}

  QAT_HD __m256 value(__m256 w) const {
    const __m256i code = code8(_mm256_add_ps(_mm256_div_ps(w, divisor), zero), low, high);
    return round_value8<kType>(_mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(code), zero), stored));
  }
};

template <DType kType>
struct MlxKernel {
  using Codec = MlxAffine;
  __m256 scale, bias, stored_scale, stored_bias, levels;

  static QAT_HD void scales(const Codec& codec, const float* w, int64_t n, float* s, Seen& seen) {
    const Ends ends = ends_of(w, n, seen);
    codec.scales_of(ends.least, ends.greatest, s);
  }

  QAT_HD MlxKernel(const Codec& codec, const Codec::Encoder& e, const float* s)
      : scale(_mm256_set1_ps(e.scale)),
        bias(_mm256_set1_ps(e.bias)),
        stored_scale(_mm256_set1_ps(s[0])),
        stored_bias(_mm256_set1_ps(s[1])),
        levels(_mm256_set1_ps(codec.levels)) {}

  QAT_HD __m256 value(__m256 w) const {
    const __m256 position = _mm256_div_ps(_mm256_sub_ps(w, bias), scale);
    const __m256 level = _mm256_cvtepi32_ps(code8(position, _mm256_setzero_ps(), levels));
    const __m256 product = round_value8<kType>(_mm256_mul_ps(level, stored_scale));
    return round_value8<kType>(_mm256_add_ps(product, stored_bias));
  }
};

template <class Kernel, class Out>
QAT_HD void quantize_block(const typename Kernel::Codec& codec, const float* w, int64_t n, Out* out,
                           Seen& seen) {
  float s[2];
  float stored[2];
  Kernel::scales(codec, w, n, s, seen);
  seen.overflow |= codec.store(s, stored) != Status::kOk;
  const auto encoder = codec.encoder(s);
  const Kernel kernel(codec, encoder, stored);
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8) put8(out + i, kernel.value(_mm256_loadu_ps(w + i)));
  for (int64_t i = whole; i < n; ++i) put1(out + i, codec.decode(codec.encode(w[i], encoder), stored));
}

/// A row of blocks of kBlock weights: loops of a known length unroll.
template <class Kernel, int64_t kBlock, class Out>
QAT_HD void blocks_of(const typename Kernel::Codec& codec, const float* w, int64_t n, Out* out, Seen& seen) {
  for (int64_t i = 0; i < n; i += kBlock) quantize_block<Kernel>(codec, w + i, kBlock, out + i, seen);
}

template <class Kernel, class Out>
QAT_HD void quantize_row(const typename Kernel::Codec& codec, const float* w, int64_t n, Out* out,
                         Seen& seen) {
  switch (codec.block) {
    case 32:
      return blocks_of<Kernel, 32>(codec, w, n, out, seen);
    case 64:
      return blocks_of<Kernel, 64>(codec, w, n, out, seen);
    case 128:
      return blocks_of<Kernel, 128>(codec, w, n, out, seen);
    case 256:
      return blocks_of<Kernel, 256>(codec, w, n, out, seen);
    default:
      return quantize_block<Kernel>(codec, w, n, out, seen);
  }
}

template <class Kernel, class Out>
Status integer_row(const void* object, const float* w, int64_t n, Out* out) {
  auto codec = *static_cast<const typename Kernel::Codec*>(object);
  Seen seen;
  if constexpr (requires { codec.scale_grid; }) {
    if (codec.scale_grid == ScaleGrid::kF32) {
      codec.scale_grid = ScaleGrid::kF32;  // a constant to the compiler, so that no rounding is left here
      quantize_row<Kernel>(codec, w, n, out, seen);
      return seen.status();
    }
  }
  quantize_row<Kernel>(codec, w, n, out, seen);
  return seen.status();
}

template <class Kernel>
constexpr RowKernels kernels() {
  return {integer_row<Kernel, float>, integer_row<Kernel, uint16_t>};
}

template <template <DType> class Kernel>
constexpr std::array<RowKernels, 3> by_type() {
  return {kernels<Kernel<DType::kF32>>(), kernels<Kernel<DType::kF16>>(), kernels<Kernel<DType::kBF16>>()};
}

}  // namespace

constinit const std::array<RowKernels, 3> kAvx2Symmetric = by_type<SymmetricKernel>();
constinit const std::array<RowKernels, 3> kAvx2Asymmetric = by_type<AsymmetricKernel>();
constinit const std::array<RowKernels, 3> kAvx2Mlx = by_type<MlxKernel>();

}  // namespace qat::grid
