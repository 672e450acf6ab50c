// Compiled for any x86-64: asks the CPU before anything from kernels_avx2.cpp runs.

#include "grid/kernels_avx2.hpp"
#include "grid/row_kernels.hpp"
#include "qat/grid/int_asymmetric.hpp"
#include "qat/grid/int_symmetric.hpp"
#include "qat/grid/mlx_affine.hpp"

namespace qat::grid {
namespace {

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

/// Where the kernels for products of that type stand in a table.
size_t index_of(DType dequant) {
  if (dequant == DType::kF16) return 1;
  return dequant == DType::kBF16 ? 2 : 0;
}

void add_search(RowKernels& kernels, const SearchKernels& search) {
  kernels.f32_search = search.f32;
  kernels.bf16_search = search.bf16;
  kernels.choose = search.choose;
  kernels.search = search.search;
}

void add_held(RowKernels& kernels, const HeldKernels& held) {
  kernels.f32_held = held.f32;
  kernels.bf16_held = held.bf16;
  kernels.backward = held.backward;
}

RowKernels joined(RowKernels kernels, const SearchKernels& search, const HeldKernels& held) {
  add_search(kernels, search);
  add_held(kernels, held);
  return kernels;
}

}  // namespace

RowKernels row_kernels(std::string_view grid) noexcept {
  if (!has_avx2()) return {};
  RowKernels kernels;
  for (const NamedKernels& named : kAvx2Kernels) {
    if (named.grid == grid) kernels = named.kernels;
  }
  for (const NamedKernels& named : kAvx2KQuants) {
    if (named.grid == grid) kernels = named.kernels;
  }
  for (const NamedSearch& named : kAvx2Searches) {
    if (named.grid == grid) add_search(kernels, named.kernels);
  }
  for (const NamedSearch& named : kAvx2LineSearches) {
    if (named.grid == grid) add_search(kernels, named.kernels);
  }
  for (const NamedHeld& named : kAvx2Held) {
    if (named.grid == grid) add_held(kernels, named.kernels);
  }
  return kernels;
}

RowKernels row_kernels(const IntSymmetric& codec) noexcept {
  if (!has_avx2()) return {};
  return joined(kAvx2Symmetric[index_of(codec.dequant)], kAvx2IntegerSearch, kAvx2SymmetricHeld);
}

RowKernels row_kernels(const IntAsymmetric& codec) noexcept {
  if (!has_avx2()) return {};
  return joined(kAvx2Asymmetric[index_of(codec.dequant)], kAvx2AsymmetricSearch, kAvx2AsymmetricHeld);
}

RowKernels row_kernels(const MlxAffine& codec) noexcept {
  if (!has_avx2()) return {};
  return joined(kAvx2Mlx[index_of(codec.dtype)], kAvx2MlxSearch, kAvx2MlxHeld);
}

}  // namespace qat::grid
