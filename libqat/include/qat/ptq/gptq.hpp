#pragma once

// GPTQ: rounds a matrix column by column and lets the columns that are still to come make up for the error
// on the layer's own inputs. (Frantar et al. 2022, arXiv:2210.17323)
//
//     minimise  tr((W - W^) H (W - W^)^T),   H = E[x x^T] of the layer's inputs x
//
// With H + damping = (U^T U)^-1, U upper triangular, column j is rounded to the grid and then
// w_k -= (w_j - w^_j) / U_jj * U_jk for all k > j. A column whose input was never anything but zero takes
// part in nothing: it is rounded as it is.
//
// Legend: R rows, N weights in a row, G grid blocks in a row, P scale parameters per block.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

namespace qat::ptq {

/// Where the scales of a block come from, given its weights.
enum class ScaleSource {
  kReference,  ///< the consumer's own rule
  kSearch,     ///< the least squared error of the weights
  kWeighted,   ///< the least squared error of the weights, each counted by its input's second moment
};

/// "reference", "search" or "weighted".
std::string_view to_string(ScaleSource source) noexcept;
/// The reverse of `to_string`. Throws ArgumentError that lists the legal names.
ScaleSource scale_source(std::string_view name);

/// Settings of `gptq`; JSON and Python use the same names.
struct GptqOptions {
  /// Added to the diagonal of H, as a share of its mean over the inputs that were ever other than zero.
  double damping = 0.01;
  /// Columns in the order of falling H_jj instead of their own. Where the scales of a block are chosen on
  /// the way, whole blocks are sorted and the columns of a block stay together.
  bool act_order = false;
  /// Scales of all blocks from the weights as they were, before any column was rounded; `act_order` then
  /// sorts single columns. Grids with one scale per row or tensor are always treated so.
  bool static_scales = false;
  /// Columns whose updates reach the later ones together; speed only. Raised to a multiple of the grid's
  /// block.
  int64_t block = 128;
  ScaleSource scale = ScaleSource::kWeighted;
  int64_t sweeps = 0;           ///< of coordinate descent afterwards, see `refine`
  at::Tensor outputs = {};      ///< for the sweeps, see RefineOptions
  double output_damping = 0.2;  ///< likewise
  /// Scales tied as SEQ ties them (grid/seq.hpp), by the same sources: kReference is alpha = max|w|. Grids
  /// that hold SEQ only. The apply_ functions say so by themselves for quantizers with the scale rule kSeq.
  bool seq = false;
};

/// What a method found. encode(latent, scales) are its codes, for any grid, so that learned scales that start
/// at `scales`, with latents that start at `latent`, start training exactly there.
struct Solution {
  at::Tensor latent;  ///< float32, shaped like the weight: its columns as they were when they were rounded
  at::Tensor scales;  ///< float32[R, G, P] ([1, 1, P] for whole-tensor grids), as `Grid::choose` gives them
};

/// weight: float32[R, ...] of N weights a row; hessian: float32 or float64[N, N], symmetric; grid: one with
/// codes. Computed in float64 on the CPU; the result does not depend on the number of threads. `tensor` is
/// the weight's name in messages.
///
/// ArgumentError for other shapes and dtypes, for widths that the grid does not divide, for float grids and
/// for options out of range; NumericError for NaN or infinity in either tensor, for a hessian that is not
/// positive definite with that damping, and for weights that the grid's scales cannot hold.
Solution gptq(const at::Tensor& weight, const at::Tensor& hessian, std::string_view grid,
              const GptqOptions& options = {}, std::string_view tensor = "");

}  // namespace qat::ptq
