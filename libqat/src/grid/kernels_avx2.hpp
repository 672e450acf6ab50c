#pragma once

// Row kernels compiled for AVX2 and F16C. Run them only after asking the CPU.

#include <array>
#include <string_view>

#include "grid/row_kernels.hpp"

namespace qat::grid {

struct NamedKernels {
  std::string_view grid;
  RowKernels kernels;
};

/// Plain data, so that no code of the AVX2 object runs before a kernel is called.
extern const std::array<NamedKernels, 31> kAvx2Kernels;

}  // namespace qat::grid
