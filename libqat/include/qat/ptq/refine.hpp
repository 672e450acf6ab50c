#pragma once

// Coordinate descent on a rounded matrix: GPTQ rounds each column once and never comes back; this does.
//
//     minimise  tr((W - W^) H (W - W^)^T),   H = E[x x^T] of the layer's inputs x
//
// A sweep goes through the blocks of each row. The scales of a block move to the least squares for the codes
// as they are, rounded to what the file can hold; then each code of the block to the level nearest to
// w^_j + (H (w - w^))_j / H_jj, the best value of that weight with all others held. No step is taken that
// would not lower the error, so the result is never worse than its start. (Coordinate descent on layer
// reconstruction: Behdin et al. 2023, QuantEase, arXiv:2309.01885; here with the scales among the
// coordinates.)

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "qat/ptq/gptq.hpp"

namespace qat::ptq {

/// Settings of `refine`; JSON and Python use the same names.
struct RefineOptions {
  double damping = 0.01;     ///< as in GptqOptions
  int64_t sweeps = 4;        ///< 0 returns the start
  bool hold_scales = false;  ///< only codes move: for scales that are tied to each other
  /// G, float32[K, S, S], symmetric: of the rows k S .. k S + S - 1 together; rows of different groups are
  /// independent. The last group may be smaller than S; what is beyond it does not count. Undefined: all rows
  /// are.
  at::Tensor outputs = {};
  double output_damping = 0.2;  ///< added to the diagonal of each group of G, as a share of its mean
};

/// weight: float32[R, ...] of N weights a row; hessian: float32 or float64[N, N], symmetric; start: a
/// solution for that weight and grid, such as gptq's. Of the result, as of every Solution, encode(latent,
/// scales) are the codes; a latent is the best value of its weight when its code was last looked at.
///
/// Grids with more than 16 levels, and grids whose scale the whole tensor shares, return the start: there is
/// next to nothing to win. Scales move where the decoded weight is linear in a block's one or two of them
/// (not in K-quants and integer zero points). Computed in float32 on the CPU; the result does not depend on
/// the number of threads. Errors as `gptq`, and ArgumentError for a start or outputs of another shape.
Solution refine(const at::Tensor& weight, const at::Tensor& hessian, std::string_view grid,
                const Solution& start, const RefineOptions& options = {}, std::string_view tensor = "");

}  // namespace qat::ptq
