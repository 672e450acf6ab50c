#pragma once

// Sums of x^T x, of which only the half that is not there by symmetry is formed.

#include <ATen/core/Tensor.h>

namespace qat::ptq {

/// sum[N, N] += factor x^T x, in panels on and right of the diagonal; left of them nothing sensible is left.
/// rows: [n, N]. Products are computed where rows are and in their dtype, and summed in sum's.
void add_products(const at::Tensor& sum, const at::Tensor& rows, double factor = 1.0);

/// What such sums [..., N, N] stand for: symmetric.
at::Tensor from_upper(const at::Tensor& sums);

}  // namespace qat::ptq
