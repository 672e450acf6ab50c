// fake_quantize with held scales and its gradients with AVX2 and F16C, equal to the scalar ones bit for bit:
// the formulas of steps.hpp and gradient.hpp with eight lanes. Compiled like kernels_avx2.cpp.

#include "grid/kernels_avx2.hpp"
#include "grid/steps_avx2.hpp"
#include "qat/grid/gradient.hpp"

namespace qat::grid {
namespace {

QAT_HD bool finite_row(const float* w, int64_t n) {
  return first_lane(spread_max(largest_lanes(w, n))) < kInfinityBits;
}

template <class Codec, class Out>
Status held_row(const void* object, const float* w, int64_t n, const float* s, Out* out) {
  if (!finite_row(w, n)) return Status::kNotFinite;
  const Codec codec = codec_of<Codec>(object);
  const int64_t block = block_of(codec, n);
  Status worst = Status::kOk;
  for (int64_t i = 0; i < n; i += block, s += kStored<Codec>) {
    float stored[kStored<Codec>];
    worst = worse(worst, store_wide(codec, s, stored));
    if (worst == Status::kOk) put_block(codec, w + i, block, s, stored, out + i);
  }
  return worst;
}

template <class Codec>
Status backward(const void* object, const float* w, int64_t n, const float* s, const float* g,
                EstimatorKind kind, float* grad_w, float* grad_s) {
  if (!finite_row(w, n)) return Status::kNotFinite;
  const Codec codec = codec_of<Codec>(object);
  return backward_row<Eight>(
      codec, block_of(codec, n), kStored<Codec>, kind, n, s, {w, g, grad_w, 0.0F}, grad_s,
      [](const Codec& by, const float* of, float* to) { return store_wide(by, of, to); });
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
