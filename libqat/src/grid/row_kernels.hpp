#pragma once

// Vectorised replacements of the functions of `Grid` that train, equal to the scalar ones bit for bit.

#include <string_view>

#include "qat/grid/grid.hpp"

namespace qat::grid {

/// `codec` points to the grid's codec, which kernels of codecs without state ignore.
template <class Out>
using RowKernel = Status (*)(const void* codec, const float* w, int64_t n, Out* w_hat);

/// The scales of a rule alone.
using ScalesKernel = Status (*)(const void* codec, const float* w, int64_t n, float* s);

/// With scales that the caller holds.
template <class Out>
using HeldKernel = Status (*)(const void* codec, const float* w, int64_t n, const float* s, Out* w_hat);

using BackwardKernel = Status (*)(const void* codec, const float* w, int64_t n, const float* s,
                                  const float* g, EstimatorKind kind, float* grad_w, float* grad_s);

/// Null members mean: use the scalar functions.
struct RowKernels {
  RowKernel<float> f32 = nullptr;
  RowKernel<uint16_t> bf16 = nullptr;
  RowKernel<float> f32_search = nullptr;
  RowKernel<uint16_t> bf16_search = nullptr;
  ScalesKernel choose = nullptr;
  ScalesKernel search = nullptr;
  HeldKernel<float> f32_held = nullptr;
  HeldKernel<uint16_t> bf16_held = nullptr;
  BackwardKernel backward = nullptr;
};

/// The fastest kernels of that grid that this CPU can run.
RowKernels row_kernels(std::string_view grid) noexcept;

struct IntSymmetric;
struct IntAsymmetric;
struct MlxAffine;

/// The same for the codecs of the integer families.
RowKernels row_kernels(const IntSymmetric& codec) noexcept;
RowKernels row_kernels(const IntAsymmetric& codec) noexcept;
RowKernels row_kernels(const MlxAffine& codec) noexcept;

}  // namespace qat::grid
