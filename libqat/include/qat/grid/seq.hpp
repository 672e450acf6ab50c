#pragma once

// Stretched elastic quantization (SEQ; ParetoQ, arXiv:2502.02631): half-integer levels, as many below zero as
// above and none at zero. With k = 2^(b-1) and one alpha for weights that share it,
//
//     w_hat = alpha * (r(w / alpha * k - 1/2) + 1/2) / k,    levels +-alpha/(2k) * {1, 3, .. 2k - 1}
//
// Formats whose levels are scale * code + offset hold this where the two are tied to each other:
//
//     mlx2_g*, mlx3_g*, mlx4_g*: scale = alpha / k, bias = -alpha (1 - 1/(2k)); free: alpha
//     q2_k: dmin = 3/2 d, sub_mins = sub_scales, alpha of a sub-block = 2 d sub_scale; free: d, 16 sub_scales
//
// `seq_tie` rounds alpha (or d) to so few bits that every tied scale, product and level is exact in the
// file's types, and so decodes exactly as above (while the least level is a normal number of the type). The
// rounding passes straight through. Weights count as inside by the grid's own rule, up to the outermost
// level, not up to alpha as in the paper.

#include <cstdint>
#include <string>
#include <vector>

#include "qat/grid/grid.hpp"

namespace qat::grid {

/// Whether a grid can hold these levels exactly: mlx2_g*, mlx3_g* and mlx4_g* with scales of any type, and
/// q2_k. The functions below are for these only.
bool holds_seq(const Grid& grid) noexcept;

/// The names of `names()` that hold them, for messages: "mlx2_g32, mlx2_g64, ...".
std::string seq_names();

/// F, the free parameters of a block: 1 (alpha), or 17 (q2_k: d and the sub-scales).
int seq_params(const Grid& grid) noexcept;

/// Sizes of the groups of free parameters that are of one kind, as `Info::fields` are of stored ones: {1}
/// (alpha), or {1, 16} (q2_k). Their sum is F.
std::vector<int> seq_groups(const Grid& grid);

/// The paper's start, alpha = max|w|. w: float32[n] -> free: float32[n / B, F]. kNotFinite as in `choose`.
Status seq_start(const Grid& grid, const float* w, int64_t n, float* free);

/// The free parameters of a smaller squared error in each block than those of `seq_start`, or the same error:
/// alpha from 0.4 to 1.4 max|w|, then fitted to its levels by least squares. importance: float64[n], what
/// each weight's squared error is multiplied with; null for 1. w, free and errors as there.
Status seq_search(const Grid& grid, const float* w, int64_t n, float* free,
                  const double* importance = nullptr);

/// The tied scales. free: float32[n / B, F] -> s: float32[n / B, P] for `fake_quantize_with` and `store`.
void seq_tie(const Grid& grid, const float* free, int64_t n, float* s);

/// Free parameters that `seq_tie` takes to s, where s is what it gives. s: float32[n / B, P] -> free:
/// float32[n / B, F].
void seq_untie(const Grid& grid, const float* s, int64_t n, float* free);

/// The chain rule through `seq_tie`. grad_s: float32[n / B, P] -> grad_free: float32[n / B, F].
void seq_tie_backward(const Grid& grid, const float* grad_s, int64_t n, float* grad_free);

}  // namespace qat::grid
