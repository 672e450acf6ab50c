// fake_quantize with searched scales, with AVX2 and F16C, equal to qat/grid/search.hpp bit for bit: steps 1
// to 3 sum 16-bit integers, whose order does not matter; step 4 has the lanes of `ErrorSum`. Compiled with
// -mavx2 -mf16c and without -mfma. Everything here is in the unnamed namespace or forced inline.

#include <type_traits>

#include "grid/kernels_avx2.hpp"
#include "grid/search_avx2.hpp"
#include "qat/grid/int_symmetric.hpp"
#include "qat/grid/q2_0.hpp"
#include "qat/grid/q8_0.hpp"
#include "qat/grid/search.hpp"
#include "qat/grid/signed_block.hpp"
#include "qat/grid/tq1_0.hpp"
#include "qat/grid/tq2_0.hpp"

namespace qat::grid {
namespace {

/// Whether the largest weight's sign is that of its scale.
template <class Codec>
constexpr bool kSigned = std::is_same_v<Codec, Q4_0> || std::is_same_v<Codec, Q5_0>;

/// choose, given the largest magnitude.
template <class Codec>
QAT_HD float choose_wide(const Codec& codec, const float* w, float largest) {
  if constexpr (requires { codec.scale_of(largest); }) {
    return codec.scale_of(largest);
  } else if constexpr (kSigned<Codec>) {
    const Block32 block = Block32::load(w);
    const int first = block.first_with(_mm256_set1_epi32(static_cast<int>(bits_of(largest))));
    return (w[first] + 0.0F) / static_cast<float>(Codec::kInfo.code_min);  // + 0: as in SignedKernel
  } else {
    return std::is_same_v<Codec, Q8_0> ? largest / 127.0F : largest;
  }
}

/// Up to kSearchChunk weights as integers, padded with zeros, which add nothing to any sum.
struct Integers {
  alignas(32) int16_t x[kSearchChunk];
  int64_t vectors;  ///< of 16

  /// Returns the sum of |x|.
  QAT_HD int64_t fill(const float* w, int64_t n, float unit) {
    const __m256 factor = _mm256_set1_ps(unit);
    const auto at = [&](int64_t i) {
      return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(w + i), factor));
    };
    __m256i magnitudes = _mm256_setzero_si256();
    const int64_t whole = n / 16;
    for (int64_t k = 0; k < whole; ++k) {
      const __m256i packed = _mm256_packs_epi32(at(16 * k), at(16 * k + 8));
      const __m256i ones = _mm256_set1_epi16(1);
      magnitudes = _mm256_add_epi32(magnitudes, _mm256_madd_epi16(_mm256_abs_epi16(packed), ones));
      _mm256_store_si256(reinterpret_cast<__m256i*>(x + 16 * k), packed);
    }
    int64_t total = sum_lanes(magnitudes);
    vectors = whole;
    if (n % 16 == 0) return total;
    for (int64_t i = 16 * whole; i < 16 * whole + 16; ++i) {
      const int value = i < n ? round_half_even(w[i] * unit) : 0;
      x[i] = static_cast<int16_t>(value);
      total += value < 0 ? -value : value;
    }
    vectors = whole + 1;
    return total;
  }
};

/// <x,q> and <q,q> of eight candidates, as int32: over a chunk neither exceeds 2^31.
struct WideSums {
  __m256i xq;
  __m256i qq;
};

/// A code between low and high, its products with x and with itself added to the sums.
QAT_HD void add_codes(__m256i x, __m256i code, __m256i low, __m256i high, __m256i& xq, __m256i& qq) {
  const __m256i q = _mm256_min_epi16(_mm256_max_epi16(code, low), high);
  xq = _mm256_add_epi32(xq, _mm256_madd_epi16(x, q));
  qq = _mm256_add_epi32(qq, _mm256_madd_epi16(q, q));
}

template <bool kBoth>
QAT_HD WideSums candidate_sums(const Integers& integers, const SearchRange& range, __m256i multipliers) {
  alignas(32) int multiplier[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(multiplier), multipliers);
  const __m256i low = _mm256_set1_epi16(static_cast<int16_t>(range.low));
  const __m256i high = _mm256_set1_epi16(static_cast<int16_t>(range.high));
  const __m256i minus_low = _mm256_set1_epi16(static_cast<int16_t>(-range.low));
  const __m256i minus_high = _mm256_set1_epi16(static_cast<int16_t>(-range.high));
  const __m256i half = _mm256_set1_epi16(1 << (kCodeFraction - 1));
  constexpr int kMagnitudes = kBoth ? kCandidates / 2 : kCandidates;
  __m256i xq[kCandidates], qq[kCandidates];
  for (int j = 0; j < kMagnitudes; ++j) {
    const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>(multiplier[j]));
    __m256i plus[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i minus[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t k = 0; k < integers.vectors; ++k) {
      const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(integers.x + 16 * k));
      const __m256i fine = _mm256_mulhrs_epi16(x, factor);
      const __m256i code = _mm256_srai_epi16(_mm256_add_epi16(fine, half), kCodeFraction);
      add_codes(x, code, low, high, plus[0], plus[1]);
      if constexpr (kBoth) add_codes(x, code, minus_high, minus_low, minus[0], minus[1]);
    }
    xq[j] = plus[0];
    qq[j] = plus[1];
    if constexpr (kBoth) {
      xq[j + kMagnitudes] = minus[0];
      qq[j + kMagnitudes] = minus[1];
    }
  }
  return {sum_each(xq), sum_each(qq)};
}

QAT_HD WideSums candidate_sums(const Integers& integers, const SearchRange& range, __m256i multipliers) {
  return range.both ? candidate_sums<true>(integers, range, multipliers)
                    : candidate_sums<false>(integers, range, multipliers);
}

/// search_multiplier of all candidates.
QAT_HD __m256i wide_multipliers(const SearchRange& range, const Ladder& ladder) {
  const __m256 place = _mm256_setr_ps(0.0F, 1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F, 7.0F);
  const __m256 scale =
      _mm256_add_ps(_mm256_set1_ps(ladder.first), _mm256_mul_ps(_mm256_set1_ps(ladder.step), place));
  const __m256 reach = _mm256_set1_ps(static_cast<float>(range.reach() << kCodeFraction));
  return _mm256_cvttps_epi32(_mm256_min_ps(_mm256_div_ps(reach, scale), _mm256_set1_ps(32000.0F)));
}

/// best_of, for the sums of one chunk.
QAT_HD float best_of(const SearchRange& range, const WideSums& sums) {
  const __m256 xq = _mm256_cvtepi32_ps(sums.xq);
  const __m256 qq = _mm256_cvtepi32_ps(_mm256_max_epi32(sums.qq, _mm256_set1_epi32(1)));
  const __m256 score = _mm256_div_ps(_mm256_mul_ps(xq, xq), qq);
  const float best = greatest_lane(score);
  if (!(best > 0.0F)) return 0.0F;
  const __m256 equal = _mm256_cmp_ps(score, _mm256_set1_ps(best), _CMP_EQ_OQ);
  const int at = __builtin_ctz(static_cast<unsigned>(_mm256_movemask_ps(equal)));
  alignas(32) float scale[8];
  _mm256_store_ps(scale, _mm256_div_ps(xq, qq));
  return range.both && at >= kCandidates / 2 ? -scale[at] : scale[at];
}

/// The sums of all chunks of a long row.
QAT_HD float best_of_row(const SearchRange& range, __m256i multipliers, const float* w, int64_t n, float unit,
                         Integers& integers) {
  SearchSums sums{};
  for (int64_t first = 0; first < n; first += kSearchChunk) {
    integers.fill(w + first, n - first < kSearchChunk ? n - first : kSearchChunk, unit);
    const WideSums chunk = candidate_sums(integers, range, multipliers);
    alignas(32) int xq[8], qq[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(xq), chunk.xq);
    _mm256_store_si256(reinterpret_cast<__m256i*>(qq), chunk.qq);
    for (int j = 0; j < kCandidates; ++j) {
      sums.xq[j] += xq[j];
      sums.qq[j] += qq[j];
    }
  }
  return best_of(range, sums);
}

/// suggest_scale of a row longer than a chunk.
QAT_HD float suggest_for_row(const SearchRange& range, const float* w, int64_t n, float largest) {
  const float unit = static_cast<float>(kSearchUnit) / largest;
  Integers integers;
  int64_t magnitudes = 0;
  for (int64_t first = 0; first < n; first += kSearchChunk) {
    magnitudes += integers.fill(w + first, n - first < kSearchChunk ? n - first : kSearchChunk, unit);
  }
  const __m256i multipliers = wide_multipliers(range, search_ladder(range, magnitudes, n));
  return largest / static_cast<float>(kSearchUnit) * best_of_row(range, multipliers, w, n, unit, integers);
}

/// Blocks that are searched side by side: each step of a search waits for the one before, so a processor
/// fills the gaps with the same step of the others.
constexpr int kGroup = 4;

/// suggest_scale of kGroup consecutive blocks of n weights, at most a chunk each. What it gives for a block
/// of zeros, tiny or infinite weights is not to be used.
QAT_HD void suggest_for_blocks(const SearchRange& range, const float* w, int64_t n, const float* largest,
                               float* suggested) {
  Integers integers[kGroup];
  __m256i multipliers[kGroup];
  WideSums sums[kGroup];
  for (int k = 0; k < kGroup; ++k) {
    const float unit = static_cast<float>(kSearchUnit) / largest[k];
    const int64_t magnitudes = integers[k].fill(w + k * n, n, unit);
    multipliers[k] = wide_multipliers(range, search_ladder(range, magnitudes, n));
  }
  for (int k = 0; k < kGroup; ++k) sums[k] = candidate_sums(integers[k], range, multipliers[k]);
  for (int k = 0; k < kGroup; ++k) {
    suggested[k] = largest[k] / static_cast<float>(kSearchUnit) * best_of(range, sums[k]);
  }
}

/// Step 4 of search_scale.
template <class Codec>
QAT_HD float better_of(const Codec& codec, const float* w, int64_t n, float largest, float suggested) {
  const float chosen = choose_wide(codec, w, largest);
  float better, kept;
  if (largest < kLeastSearched || suggested == 0.0F) return chosen;
  if (store_wide(codec, &suggested, &better) != Status::kOk) return chosen;
  if (store_wide(codec, &chosen, &kept) != Status::kOk) return better;
  const float unit = error_unit(largest);
  const double error = wide_error(codec, w, n, &better, &better, unit);
  return error < wide_error(codec, w, n, &chosen, &kept, unit) ? better : chosen;
}

/// The largest magnitude of a block, also noted in `seen`.
QAT_HD float largest_of(const float* w, int64_t n, Seen& seen) {
  const __m256i lanes = spread_max(largest_lanes(w, n));
  seen.largest = _mm256_max_epi32(seen.largest, lanes);
  return float_of(first_lane(lanes));
}

template <class Codec, class Sink>
QAT_HD void put_searched(const Codec& codec, const float* w, int64_t i, int64_t n, float largest,
                         float suggested, Sink sink, Seen& seen) {
  if (!is_finite(largest)) return;
  const float s = better_of(codec, w + i, n, largest, suggested);
  sink.put(codec, w, i, n, &s, seen);
}

template <class Codec, class Sink>
QAT_HD void search_blocks(const Codec& codec, const SearchRange& range, int64_t block, const float* w,
                          int64_t n, Sink sink, Seen& seen) {
  int64_t i = 0;
  float largest[kGroup], suggested[kGroup];
  for (; block <= kSearchChunk && i + kGroup * block <= n; i += kGroup * block) {
    for (int k = 0; k < kGroup; ++k) largest[k] = largest_of(w + i + k * block, block, seen);
    suggest_for_blocks(range, w + i, block, largest, suggested);
    for (int k = 0; k < kGroup; ++k) {
      put_searched(codec, w, i + k * block, block, largest[k], suggested[k], sink, seen);
    }
  }
  for (; i < n; i += block) {
    const float most = largest_of(w + i, block, seen);
    const bool searched = is_finite(most) && most >= kLeastSearched;
    const float found = searched ? suggest_for_row(range, w + i, block, most) : 0.0F;
    put_searched(codec, w, i, block, most, found, sink, seen);
  }
}

template <class Codec>
QAT_HD SearchRange range_of(const Codec& codec) {
  if constexpr (Constant<Codec>) {
    return search_range(Codec::kInfo, Signs::kBoth);
  } else {
    return search_range(codec.info(), codec.negative ? Signs::kBoth : Signs::kPositive);
  }
}

template <class Codec, class Sink>
Status search_row(const void* object, const float* w, int64_t n, Sink sink) {
  const Codec codec = codec_of<Codec>(object);
  const int64_t block = block_of(codec, n);
  Seen seen;
  if (block == 32) {
    search_blocks(codec, range_of(codec), 32, w, n, sink, seen);  // the most frequent one: its loops unroll
  } else {
    search_blocks(codec, range_of(codec), block, w, n, sink, seen);
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
  for (int64_t i = 0; i < n; i += block, ++s) {
    const float largest = largest_of(w + i, block, seen);
    if (is_finite(largest)) *s = choose_wide(codec, w + i, largest);
  }
  return seen.status();
}

template <class Codec>
constexpr SearchKernels kSearch{search_weights<Codec, float>, search_weights<Codec, uint16_t>,
                                choose_scales<Codec>, search_scales<Codec>};

template <class Codec>
constexpr NamedSearch searched() {
  return {Codec::kInfo.name, kSearch<Codec>};
}

}  // namespace

constinit const std::array<NamedSearch, 6> kAvx2Searches{{searched<Q4_0>(), searched<Q5_0>(),
                                                          searched<Q8_0>(), searched<Q2_0>(),
                                                          searched<TQ1_0>(), searched<TQ2_0>()}};

constinit const SearchKernels kAvx2IntegerSearch = kSearch<IntSymmetric>;

}  // namespace qat::grid
