// The K-quants with AVX2 and F16C, equal to the scalar codecs bit for bit: the searches run in all sub-blocks
// at once, one lane a sub-block; codes and weights are computed eight at a time. Compiled like
// kernels_avx2.cpp.

#include <immintrin.h>

#include "grid/avx2.hpp"
#include "grid/kernels_avx2.hpp"
#include "grid/steps_avx2.hpp"
#include "qat/grid/gradient.hpp"
#include "qat/grid/q2_k.hpp"
#include "qat/grid/q3_k.hpp"
#include "qat/grid/q4_k.hpp"
#include "qat/grid/q6_k.hpp"

namespace qat::grid {
namespace {

template <class Codec>
struct AffineKernel {
  static constexpr int kWeights = Codec::kWeights;
  static constexpr int kSubBlocks = Codec::kSubBlocks;
  using F = Lanes<kSubBlocks / 8>;

  static QAT_HD void choose(const float* w, float* s) {
    Codec::template choose_by<typename Codec::SubRule, F>(w, s);
  }

  /// Where a sub-block's scale is 0 its codes do not matter: 0 * code is +0.
  template <class Out>
  static QAT_HD void quantize(const float* w, const float*, const float* stored, Out* out) {
    for (int i = 0; i < kSuperBlock; i += 8) {
      const typename Codec::Step step = Codec::step(stored, i / kWeights);
      const Eight code =
          ggml_code((loaded(w + i) + step.minimum) / Eight(step.scale), 0, Codec::kInfo.code_max);
      put8(out + i, (step.scale * code - step.minimum).v[0]);
    }
  }
};

template <class Codec>
struct SymmetricKernel {
  static constexpr int kWeights = Codec::kWeights;
  static constexpr int kSubBlocks = Codec::kSubBlocks;
  using F = Lanes<kSubBlocks / 8>;

  static QAT_HD void choose(const float* w, float* s) { Codec::template choose_by<F>(w, s); }

  /// Where a sub-block's scale is 0, the signs of the zeros are those of its search's codes.
  template <class Out>
  static QAT_HD void quantize(const float* w, const float* s, const float* stored, Out* out) {
    bool any_zero = false;
    for (int sub = 0; sub < kSubBlocks; ++sub) any_zero |= Codec::step(stored, sub) == 0.0F;
    if (any_zero) return quantize_by_codec(w, s, stored, out);
    for (int i = 0; i < kSuperBlock; i += 8) {
      const Eight step = Codec::step(stored, i / kWeights);
      put8(out + i,
           (step * ggml_code(loaded(w + i) / step, Codec::kInfo.code_min, Codec::kInfo.code_max)).v[0]);
    }
  }

  template <class Out>
  static QAT_HD void quantize_by_codec(const float* w, const float* s, const float* stored, Out* out) {
    int8_t codes[kSuperBlock];
    float w_hat[kSuperBlock];
    Codec::encode_block(w, kSuperBlock, s, codes);
    Codec::decode_block(codes, kSuperBlock, stored, w_hat);
    for (int i = 0; i < kSuperBlock; i += 8) put8(out + i, _mm256_loadu_ps(w_hat + i));
  }
};

template <class Codec, class Kernel, ScaleRule kRule, class Out>
Status kquant_row(const void*, const float* w, int64_t n, Out* out) {
  Seen seen;
  seen.largest = largest_lanes(w, n);
  if (seen.status() == Status::kNotFinite) return Status::kNotFinite;
  for (int64_t i = 0; i < n; i += kSuperBlock) {
    float s[Codec::kParams];
    float stored[Codec::kParams];
    if constexpr (kRule == ScaleRule::kSearch) {
      Codec::template search_by<typename Kernel::F>(w + i, s);
    } else {
      Kernel::choose(w + i, s);
    }
    if (Codec::store(s, stored) != Status::kOk) return Status::kOverflow;
    Kernel::quantize(w + i, s, stored, out + i);
  }
  return Status::kOk;
}

template <class Codec, class Kernel, ScaleRule kRule>
Status scales_row(const void*, const float* w, int64_t n, float* s) {
  Seen seen;
  seen.largest = largest_lanes(w, n);
  if (seen.status() == Status::kNotFinite) return Status::kNotFinite;
  for (int64_t i = 0; i < n; i += kSuperBlock, s += Codec::kParams) {
    if constexpr (kRule == ScaleRule::kSearch) {
      Codec::template search_by<typename Kernel::F>(w + i, s);
    } else {
      Kernel::choose(w + i, s);
    }
  }
  return Status::kOk;
}

template <class Codec, class Kernel, class Out>
Status held_row(const void*, const float* w, int64_t n, const float* s, Out* out) {
  Seen seen;
  seen.largest = largest_lanes(w, n);
  if (seen.status() == Status::kNotFinite) return Status::kNotFinite;
  Status worst = Status::kOk;
  for (int64_t i = 0; i < n; i += kSuperBlock, s += Codec::kParams) {
    float stored[Codec::kParams];
    worst = worse(worst, Codec::store(s, stored));
    if (worst == Status::kOk) Kernel::quantize(w + i, s, stored, out + i);
  }
  return worst;
}

template <class Codec>
Status backward(const void*, const float* w, int64_t n, const float* s, const float* g, EstimatorKind kind,
                float* grad_w, float* grad_s) {
  Seen seen;
  seen.largest = largest_lanes(w, n);
  if (seen.status() == Status::kNotFinite) return Status::kNotFinite;
  return backward_row<Eight>(Codec{}, kSuperBlock, Codec::kParams, kind, n, s, {w, g, grad_w, 0.0F}, grad_s,
                             [](const Codec&, const float* of, float* to) { return Codec::store(of, to); });
}

template <class Codec, class Kernel>
constexpr NamedKernels blocks() {
  return {Codec::kInfo.name,
          {kquant_row<Codec, Kernel, ScaleRule::kReference, float>,
           kquant_row<Codec, Kernel, ScaleRule::kReference, uint16_t>,
           kquant_row<Codec, Kernel, ScaleRule::kSearch, float>,
           kquant_row<Codec, Kernel, ScaleRule::kSearch, uint16_t>,
           scales_row<Codec, Kernel, ScaleRule::kReference>, scales_row<Codec, Kernel, ScaleRule::kSearch>,
           held_row<Codec, Kernel, float>, held_row<Codec, Kernel, uint16_t>, backward<Codec>}};
}

template <class Codec>
constexpr NamedKernels affine() {
  return blocks<Codec, AffineKernel<Codec>>();
}

template <class Codec>
constexpr NamedKernels symmetric() {
  return blocks<Codec, SymmetricKernel<Codec>>();
}

}  // namespace

constinit const std::array<NamedKernels, 5> kAvx2KQuants{
    {affine<Q2_K>(), symmetric<Q3_K>(), affine<Q4_K>(), affine<Q5_K>(), symmetric<Q6_K>()}};

}  // namespace qat::grid
