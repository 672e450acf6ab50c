#pragma once

// Vectorised replacements of `Grid::fake_quantize` and `fake_quantize_bf16`, equal to the scalar ones bit for
// bit.

#include <string_view>

#include "qat/grid/grid.hpp"

namespace qat::grid {

/// Null members mean: use the scalar functions.
struct RowKernels {
  Status (*f32)(const float* w, int64_t n, float* w_hat) = nullptr;
  Status (*bf16)(const float* w, int64_t n, uint16_t* w_hat) = nullptr;
};

/// The fastest kernels of that grid that this CPU can run.
RowKernels row_kernels(std::string_view grid) noexcept;

}  // namespace qat::grid
