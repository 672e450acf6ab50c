// Compiled for any x86-64: asks the CPU before anything from kernels_avx2.cpp runs.

#include "grid/kernels_avx2.hpp"
#include "grid/row_kernels.hpp"

namespace qat::grid {

RowKernels row_kernels(std::string_view grid) noexcept {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return {};
  for (const NamedKernels& named : kAvx2Kernels) {
    if (named.grid == grid) return named.kernels;
  }
  return {};
}

}  // namespace qat::grid
