#include "grid/row_kernels.hpp"

namespace qat::grid {

RowKernels row_kernels(std::string_view) noexcept {
  return {};
}

RowKernels row_kernels(const IntSymmetric&) noexcept {
  return {};
}

RowKernels row_kernels(const IntAsymmetric&) noexcept {
  return {};
}

RowKernels row_kernels(const MlxAffine&) noexcept {
  return {};
}

}  // namespace qat::grid
