// fake_quantize with a searched scale and offset, with AVX2 and F16C, equal to qat/grid/search_line.hpp bit
// for bit. Compiled with -mavx2 -mf16c and without -mfma. Everything here is in the unnamed namespace or
// forced inline.

#include "grid/kernels_avx2.hpp"
#include "grid/search_avx2.hpp"
#include "qat/grid/int_asymmetric.hpp"
#include "qat/grid/mlx_affine.hpp"
#include "qat/grid/offset_block.hpp"
#include "qat/grid/search_line.hpp"

namespace qat::grid {
namespace {

/// Least and greatest of n weights, and the largest magnitude, as bit patterns in every lane.
struct Extent {
  float least;
  float greatest;
  __m256i largest;
};

QAT_HD Extent extent_of(const float* w, int64_t n) {
  __m256 least = _mm256_set1_ps(w[0]);
  __m256 greatest = least;
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8) {
    least = _mm256_min_ps(least, _mm256_loadu_ps(w + i));
    greatest = _mm256_max_ps(greatest, _mm256_loadu_ps(w + i));
  }
  for (int64_t i = whole; i < n; ++i) {
    least = _mm256_min_ps(least, _mm256_set1_ps(w[i]));
    greatest = _mm256_max_ps(greatest, _mm256_set1_ps(w[i]));
  }
  return {least_lane(least), greatest_lane(greatest), spread_max(largest_lanes(w, n))};
}

/// choose, given the ends.
template <class Codec>
QAT_HD void choose_wide(const Codec& codec, const float* w, const Extent& extent, float* s) {
  if constexpr (requires { codec.scales_of(extent.least, extent.greatest, s); }) {
    codec.scales_of(extent.least, extent.greatest, s);
  } else {
    // + 0: as in the kernel with the reference's scales
    s[0] = (extent.greatest - extent.least + 0.0F) / static_cast<float>(Codec::kInfo.code_max);
    s[1] = extent.least;
    // Of zeros the first one, whose sign the file keeps.
    for (int64_t i = 0; s[1] == 0.0F; ++i) {
      if (w[i] != 0.0F) continue;
      s[1] = w[i];
      break;
    }
  }
}

/// The x of up to kSearchChunk weights, a multiple of 16. Returns their sum.
QAT_HD int64_t line_integers(const float* w, int64_t n, const LineUnit& unit, int16_t* x) {
  constexpr auto kMost = static_cast<float>(kSearchUnit);
  const __m256 factor = _mm256_set1_ps(kMost / unit.half);
  const __m256 centre = _mm256_set1_ps(unit.centre);
  const auto at = [&](int64_t i) {
    const __m256 place = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w + i), centre), factor);
    return _mm256_cvtps_epi32(clamp8(place, -kMost, kMost));
  };
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i packed = _mm256_packs_epi32(at(i), at(i + 8));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(packed, _mm256_set1_epi16(1)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(x + i), packed);
  }
  return sum_lanes(sum);
}

/// Adds n weights, at most kSearchChunk, to the sums of every candidate.
QAT_HD void add_chunk(int levels, const LineCode* codes, const int16_t* x, int64_t n, LineSums& sums) {
  const __m256i low = _mm256_set1_epi16(static_cast<int16_t>(-(levels / 2)));
  const __m256i high = _mm256_set1_epi16(static_cast<int16_t>(levels - 1 - levels / 2));
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i q[kCandidates], qq[kCandidates], xq[kCandidates];
  for (int j = 0; j < kCandidates; ++j) {
    const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>(codes[j].multiplier));
    const int shift = codes[j].shift + (1 << (kCodeFraction - 1));
    const __m256i add = _mm256_set1_epi16(static_cast<int16_t>(shift));
    q[j] = qq[j] = xq[j] = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 16) {
      const __m256i value = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + i));
      const __m256i fine = _mm256_add_epi16(_mm256_mulhrs_epi16(value, factor), add);
      const __m256i rounded = _mm256_srai_epi16(fine, kCodeFraction);
      const __m256i code = _mm256_min_epi16(_mm256_max_epi16(rounded, low), high);
      q[j] = _mm256_add_epi32(q[j], _mm256_madd_epi16(code, ones));
      qq[j] = _mm256_add_epi32(qq[j], _mm256_madd_epi16(code, code));
      xq[j] = _mm256_add_epi32(xq[j], _mm256_madd_epi16(value, code));
    }
  }
  alignas(32) int32_t each[3][kCandidates];
  _mm256_store_si256(reinterpret_cast<__m256i*>(each[0]), sum_each(q));
  _mm256_store_si256(reinterpret_cast<__m256i*>(each[1]), sum_each(qq));
  _mm256_store_si256(reinterpret_cast<__m256i*>(each[2]), sum_each(xq));
  for (int j = 0; j < kCandidates; ++j) {
    sums.q[j] += each[0][j];
    sums.qq[j] += each[1][j];
    sums.xq[j] += each[2][j];
  }
}

/// suggest_line. codes: of all candidates.
QAT_HD Line suggest_wide(int levels, const LineCode* codes, const float* w, int64_t n, const LineUnit& unit) {
  if (n % 16 != 0) return suggest_line(levels, w, n, unit);
  alignas(32) int16_t x[kSearchChunk];
  LineSums sums{};
  int64_t total = 0;
  for (int64_t first = 0; first < n; first += kSearchChunk) {
    const int64_t count = n - first < kSearchChunk ? n - first : kSearchChunk;
    total += line_integers(w + first, count, unit, x);
    add_chunk(levels, codes, x, count, sums);
  }
  return in_weights(best_line(levels, n, total, sums), unit);
}

/// search_scale_and_offset, given the ends.
template <class Codec>
QAT_HD void search_wide(const Codec& codec, const LineCode* codes, const float* w, int64_t n,
                        const Extent& extent, float* s) {
  choose_wide(codec, w, extent, s);
  const LineUnit unit = line_unit(extent.least, extent.greatest);
  if (!(unit.half >= kLeastSearched)) return;
  const Info& info = info_of(codec);
  const Line line = suggest_wide(info.code_max - info.code_min + 1, codes, w, n, unit);
  float better[2], kept[2];
  if (!stored_line(codec, line, better)) return;
  const bool legal = codec.store(s, kept) == Status::kOk;
  const float error_of = error_unit(float_of(first_lane(extent.largest)));
  if (!legal ||
      wide_error(codec, w, n, better, better, error_of) < wide_error(codec, w, n, s, kept, error_of)) {
    s[0] = better[0];
    s[1] = better[1];
  }
}

template <class Codec, class Sink>
Status search_row(const void* object, const float* w, int64_t n, Sink sink) {
  const Codec codec = codec_of<Codec>(object);
  const int64_t block = block_of(codec, n);
  const Info& info = info_of(codec);
  LineCode codes[kCandidates];
  for (int j = 0; j < kCandidates; ++j) codes[j] = line_code(info.code_max - info.code_min + 1, j);
  Seen seen;
  for (int64_t i = 0; i < n; i += block) {
    const Extent extent = extent_of(w + i, block);
    seen.largest = _mm256_max_epi32(seen.largest, extent.largest);
    if (first_lane(extent.largest) >= kInfinityBits) continue;
    float s[2];
    search_wide(codec, codes, w + i, block, extent, s);
    sink.put(codec, w, i, block, s, seen);
  }
  return seen.status();
}

template <class Codec, class Out>
Status search_weights(const void* codec, const float* w, int64_t n, Out* out) {
  return search_row<Codec>(codec, w, n, WeightSink<Out>{out});
}

template <class Codec>
Status search_scales(const void* codec, const float* w, int64_t n, float* s) {
  return search_row<Codec>(codec, w, n, ScaleSink{s});
}

template <class Codec>
Status choose_scales(const void* object, const float* w, int64_t n, float* s) {
  const Codec codec = codec_of<Codec>(object);
  const int64_t block = block_of(codec, n);
  Seen seen;
  for (int64_t i = 0; i < n; i += block, s += 2) {
    const Extent extent = extent_of(w + i, block);
    seen.largest = _mm256_max_epi32(seen.largest, extent.largest);
    if (first_lane(extent.largest) < kInfinityBits) choose_wide(codec, w + i, extent, s);
  }
  return seen.status();
}

template <class Codec>
constexpr SearchKernels kSearch{search_weights<Codec, float>, search_weights<Codec, uint16_t>,
                                choose_scales<Codec>, search_scales<Codec>};

}  // namespace

constinit const std::array<NamedSearch, 2> kAvx2LineSearches{
    {{Q4_1::kInfo.name, kSearch<Q4_1>}, {Q5_1::kInfo.name, kSearch<Q5_1>}}};

constinit const SearchKernels kAvx2MlxSearch = kSearch<MlxAffine>;
constinit const SearchKernels kAvx2AsymmetricSearch = kSearch<IntAsymmetric>;

}  // namespace qat::grid
