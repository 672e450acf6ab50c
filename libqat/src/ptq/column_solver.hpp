#pragma once

// GPTQ's loop over the columns of a few rows.

#include <cstdint>
#include <vector>

#include "ptq/scales.hpp"
#include "qat/grid/grid.hpp"

namespace qat::ptq {

/// What all rows share.
struct ColumnPlan {
  const grid::Grid& grid;
  int64_t n;                   ///< weights in a row
  std::vector<int64_t> order;  ///< [N]: the columns in the order in which they are rounded
  const double* factor;        ///< U of `inverse_factor`, [N, N] in that order
  int64_t block;               ///< columns that are propagated together, a multiple of the grid's block
  ScaleChoice scale;
  const double* importance;  ///< [N], in the weights' own order
  bool dynamic;              ///< scales of a block are chosen when its first column is reached
};

/// Rounds up to kRows rows at a time. Holds buffers: one per thread.
class ColumnSolver {
 public:
  /// Rows that share a pass over the factor. Each row's result is the same in any company.
  static constexpr int64_t kRows = 8;

  explicit ColumnSolver(const ColumnPlan& plan);

  /// w: float32[rows, N], finite -> latent: float32[rows, N]. scales: float32[rows, row_scales], filled here
  /// when the plan is dynamic, otherwise read; row_scales is 0 when all rows share one. Returns the row that
  /// failed and why; latent and scales are then unspecified.
  struct Result {
    int64_t row = 0;
    grid::Status status = grid::Status::kOk;
  };
  Result operator()(const float* w, int64_t rows, float* latent, float* scales, int64_t row_scales);

 private:
  /// Rounds the columns at positions [first, last) of one row and leaves their errors.
  grid::Status round_columns(int64_t first, int64_t last, double* work, double* errors, float* latent,
                             float* s);
  /// The rounded weight of `column`, from the row's present latents.
  grid::Status round_one(int64_t column, const float* latent, const float* s, float* w_hat);
  /// Chooses the scales of the block whose columns begin at that position.
  grid::Status choose_scales(int64_t position, const double* work, float* latent, float* s);
  /// Takes the errors of positions [first, last) out of all later columns.
  void propagate(int64_t first, int64_t last, int64_t rows);

  const ColumnPlan& plan_;
  ScaleChooser chooser_;
  std::vector<double> work_;    ///< [kRows, N]: compensated weights in rounding order
  std::vector<double> errors_;  ///< [kRows, block]: (w - w_hat) / U_jj of the present columns
  std::vector<float> rounded_;  ///< [B]
};

}  // namespace qat::ptq
