#pragma once

// Scales of least squared error where some inputs matter more than others.

#include <ATen/core/Tensor.h>

#include <string_view>

namespace qat::ptq {

/// Scales that minimise, in each block of the grid, sum_i importance_i * (w_i - w^_i)^2.
///
/// Candidates are the consumer's rule for the weights multiplied by 0.35, 0.4 ... 1.1 (of both signs for
/// grids with one scale) and the grid's own unweighted search. Of each, the scales are then fitted to the
/// codes in closed form (weighted least squares), which is repeated while the error falls. The grid's own
/// store, encode and decode measure every candidate, so the result is never worse than the rule or the
/// unweighted search.
///
/// weight: float32[R, ...] of N weights a row; importance: float32 or float64[N], not negative, for example
/// the diagonal of the hessian; an importance of zero everywhere in a block stands for equal ones. Returns
/// float32[R, G, P] ([1, 1, P] for whole-tensor grids), deterministic. ArgumentError for other shapes, dtypes
/// and grids; NumericError for NaN, infinity and weights that no scale of the grid can hold. `seq`: scales
/// tied as SEQ ties them, by grid::seq_search.
at::Tensor weighted_search(const at::Tensor& weight, const at::Tensor& importance, std::string_view grid,
                           std::string_view tensor = "", bool seq = false);

}  // namespace qat::ptq
