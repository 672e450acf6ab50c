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
extern const std::array<NamedKernels, 10> kAvx2Kernels;

/// For `IntSymmetric`, `IntAsymmetric` and `MlxAffine`, by the type of products: float32, float16, bfloat16.
/// The kernels with searched scales, and those that give scales alone.
struct SearchKernels {
  RowKernel<float> f32;
  RowKernel<uint16_t> bf16;
  ScalesKernel choose;
  ScalesKernel search;
};

struct NamedSearch {
  std::string_view grid;
  SearchKernels kernels;
};

extern const std::array<NamedSearch, 6> kAvx2Searches;
extern const std::array<NamedSearch, 2> kAvx2LineSearches;
extern const SearchKernels kAvx2IntegerSearch;
extern const SearchKernels kAvx2AsymmetricSearch;
extern const SearchKernels kAvx2MlxSearch;

/// For `IntSymmetric`, by its type of products: float32, float16, bfloat16.
extern const std::array<RowKernels, 3> kAvx2Symmetric;
extern const std::array<RowKernels, 3> kAvx2Asymmetric;
extern const std::array<RowKernels, 3> kAvx2Mlx;

/// The kernels with held scales, and their gradients.
struct HeldKernels {
  HeldKernel<float> f32;
  HeldKernel<uint16_t> bf16;
  BackwardKernel backward;
};

struct NamedHeld {
  std::string_view grid;
  HeldKernels kernels;
};

extern const std::array<NamedHeld, 11> kAvx2Held;
extern const HeldKernels kAvx2SymmetricHeld;
extern const HeldKernels kAvx2AsymmetricHeld;
extern const HeldKernels kAvx2MlxHeld;

/// All of the K-quants.
extern const std::array<NamedKernels, 5> kAvx2KQuants;

}  // namespace qat::grid
