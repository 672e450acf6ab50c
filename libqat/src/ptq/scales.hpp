#pragma once

// Scales of rows and blocks by any of the three sources.

#include <cstdint>
#include <optional>
#include <vector>

#include "ptq/block_search.hpp"
#include "qat/ptq/gptq.hpp"

namespace qat::ptq {

/// How scales are found, and whether SEQ ties them (grids that hold it only).
struct ScaleChoice {
  ScaleSource source = ScaleSource::kReference;
  bool seq = false;
};

/// Chooses scales. Holds buffers: one per thread.
class ScaleChooser {
 public:
  /// n: weights in a row that `grid` divides.
  ScaleChooser(const grid::Grid& grid, ScaleChoice choice, int64_t n);

  /// w: float32[count] of whole blocks, importance: float64[count] (read for kWeighted only) -> s:
  /// float32[count / B, P].
  grid::Status operator()(const float* w, const double* importance, int64_t count, float* s);

 private:
  grid::Status choose_tied(const float* w, const double* importance, int64_t count, float* s);

  const grid::Grid& grid_;
  ScaleChoice choice_;
  int64_t block_;
  std::optional<BlockSearch> search_;
  std::vector<float> free_;  ///< of SEQ
};

/// Scales of a whole tensor. weight: contiguous float32[R, N], importance: float64[N] (may be undefined
/// unless kWeighted) -> float32[R, G, P] or [1, 1, P]. NumericError naming tensor and row.
at::Tensor choose_scales(std::string_view function, std::string_view tensor, const grid::Grid& grid,
                         ScaleChoice choice, const at::Tensor& weight, const at::Tensor& importance);

}  // namespace qat::ptq
