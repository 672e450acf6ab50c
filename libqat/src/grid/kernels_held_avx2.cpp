// fake_quantize with held scales and its gradients with AVX2 and F16C, equal to the scalar ones bit for bit:
// the formulas of steps.hpp and gradient.hpp with eight lanes. Compiled like kernels_avx2.cpp.

#include <algorithm>
#include <concepts>

#include "grid/kernels_avx2.hpp"
#include "grid/lanes_avx2.hpp"
#include "qat/grid/gradient.hpp"

namespace qat::grid {
namespace {

using Eight = Lanes<1>;

/// A codec whose constants are known when it is compiled.
template <class Codec>
concept Constant = requires { Codec::kInfo; };

template <class Codec>
constexpr bool kHalves = [] {
  if constexpr (Constant<Codec>) {
    return std::ranges::all_of(Codec::kInfo.fields, [](const Field& f) { return f.dtype == DType::kF16; });
  }
  return false;
}();

template <class Codec>
constexpr int kStored = [] {
  int total = std::same_as<Codec, IntSymmetric> ? 1 : 2;
  if constexpr (Constant<Codec>) {
    total = 0;
    for (const Field& field : Codec::kInfo.fields) total += field.count;
  }
  return total;
}();

/// codec.store; halves by the processor's own conversion.
template <class Codec>
struct Store {
  QAT_HD Status operator()(const Codec& codec, const float* s, float* stored) const {
    if constexpr (kHalves<Codec>) {
      Status status = Status::kOk;
      for (int i = 0; i < kStored<Codec>; ++i) {
        stored[i] = through_f16(s[i]);
        const bool nan = s[i] != s[i];
        status = worse(status, nan                    ? Status::kNotFinite
                               : is_finite(stored[i]) ? Status::kOk
                                                      : Status::kOverflow);
      }
      return status;
    } else {
      return codec.store(s, stored);
    }
  }
};

template <class Codec>
QAT_HD Codec codec_of(const void* object) {
  if constexpr (Constant<Codec>) {
    return Codec{};
  } else {
    return *static_cast<const Codec*>(object);
  }
}

template <class Codec>
QAT_HD int64_t block_of(const Codec& codec, int64_t n) {
  if constexpr (Constant<Codec>) {
    return Codec::kInfo.block;
  } else {
    return codec.block > 0 ? codec.block : n;
  }
}

QAT_HD bool finite_row(const float* w, int64_t n) {
  return first_lane(spread_max(largest_lanes(w, n))) < kInfinityBits;
}

template <class Wide, class Narrow, class Out>
QAT_HD void put_block(const Wide& wide, const Narrow& narrow, const float* w, int64_t n, Out* out) {
  const int64_t whole = n - n % 8;
  for (int64_t i = 0; i < whole; i += 8) {
    Eight v;
    load_lanes(w + i, &v);
    put8(out + i, wide.weight(wide.level(v, wide.position(v))).v[0]);
  }
  for (int64_t i = whole; i < n; ++i) {
    put1(out + i, narrow.weight(narrow.level(w[i], narrow.position(w[i]))));
  }
}

template <class Codec, class Out>
Status held_row(const void* object, const float* w, int64_t n, const float* s, Out* out) {
  if (!finite_row(w, n)) return Status::kNotFinite;
  const Codec codec = codec_of<Codec>(object);
  const int64_t block = block_of(codec, n);
  Status worst = Status::kOk;
  for (int64_t i = 0; i < n; i += block, s += kStored<Codec>) {
    float stored[kStored<Codec>];
    worst = worse(worst, Store<Codec>{}(codec, s, stored));
    if (worst != Status::kOk) continue;
    put_block(Steps<Codec, Eight>(codec, s, stored), Steps<Codec, float>(codec, s, stored), w + i, block,
              out + i);
  }
  return worst;
}

template <class Codec>
Status backward(const void* object, const float* w, int64_t n, const float* s, const float* g,
                EstimatorKind kind, float* grad_w, float* grad_s) {
  if (!finite_row(w, n)) return Status::kNotFinite;
  const Codec codec = codec_of<Codec>(object);
  return backward_row<Eight>(codec, block_of(codec, n), kStored<Codec>, kind, n, s, {w, g, grad_w, 0.0F},
                             grad_s, Store<Codec>{});
}

template <class Codec>
constexpr HeldKernels kHeld{held_row<Codec, float>, held_row<Codec, uint16_t>, backward<Codec>};

template <class Codec>
constexpr NamedHeld named() {
  return {Codec::kInfo.name, kHeld<Codec>};
}

}  // namespace

constinit const std::array<NamedHeld, 11> kAvx2Held{
    {named<Q4_0>(), named<Q4_1>(), named<Q5_0>(), named<Q5_1>(), named<Q8_0>(), named<Q2_0>(), named<Q1_0>(),
     named<TQ1_0>(), named<TQ2_0>(), named<Mxfp4>(), named<Nvfp4>()}};

constinit const HeldKernels kAvx2SymmetricHeld = kHeld<IntSymmetric>;
constinit const HeldKernels kAvx2AsymmetricHeld = kHeld<IntAsymmetric>;
constinit const HeldKernels kAvx2MlxHeld = kHeld<MlxAffine>;

}  // namespace qat::grid
