#pragma once

// The factor of the inverse Hessian that GPTQ's columns are compensated with.

#include <ATen/core/Tensor.h>

#include <vector>

#include "ptq/check.hpp"

namespace qat::ptq {

/// hessian: contiguous float64[N, N] -> U: contiguous float64[N, N], upper triangular with
/// (H_order + damping * mean * I)^-1 = U^T U, where H_order has its rows and columns in that order and `mean`
/// is that of the diagonal's entries above zero. Entries of the diagonal that are not above zero are replaced
/// by `mean` first. The same bits for any number of threads. NumericError when the damped matrix is not
/// positive definite.
at::Tensor inverse_factor(const Subject& subject, const at::Tensor& hessian, double damping,
                          const std::vector<int64_t>& order);

}  // namespace qat::ptq
