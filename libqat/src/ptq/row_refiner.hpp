#pragma once

// One row under coordinate descent; see qat/ptq/refine.hpp.

#include <cstdint>
#include <vector>

#include "qat/grid/grid.hpp"

namespace qat::ptq {

/// Owns the buffers of a row; one per thread.
class RowRefiner {
 public:
  /// hessian: float32[n, n], damped; n weights in a row.
  RowRefiner(const grid::Grid& grid, const float* hessian, int64_t n, int64_t sweeps, bool hold_scales);

  /// w: the float weights[n]; h_error: H (w - w_hat) of the start; latent, scales: the start's. All but the
  /// first are overwritten with the result's. A row whose result would not encode to its codes keeps its
  /// start.
  grid::Status operator()(const float* w, float* h_error, float* latent, float* scales);

 private:
  grid::Status load(const float* h_error, const float* latent, const float* scales);
  void sweep();
  void move_scales(int64_t block);
  bool solve_scales(const float* codes_hat, int64_t first, float* change);
  void move_codes(int64_t block);
  void make_levels(int64_t block);
  /// w_hat[first + i] += change[i] for a whole block, and h_error with it.
  void shift(int64_t first, const float* change);
  /// a^T H b of a block.
  double with_hessian(int64_t first, const float* a, const float* b) const;
  /// a^T h_error of a block.
  double with_error(int64_t first, const float* a) const;
  void finish(float* h_error, float* latent, float* scales);

  const grid::Grid& grid_;
  const float* hessian_;
  int64_t n_, sweeps_, block_;
  int params_;
  int levels_count_;
  bool linear_;                   ///< the decoded weight is linear in a block's scales, which may move
  std::vector<float> latent_;     ///< [n]
  std::vector<float> scales_;     ///< [n / block, P], unstored
  std::vector<float> stored_;     ///< the same, stored
  std::vector<int8_t> codes_;     ///< [n]
  std::vector<float> w_hat_;      ///< [n]
  std::vector<float> h_error_;    ///< [n]: H (w - w_hat)
  std::vector<float> levels_;     ///< [levels, block] of the block under way
  std::vector<float> unit_;       ///< [P, block]: d w_hat / d scale
  std::vector<float> trial_;      ///< [block]
  std::vector<int8_t> constant_;  ///< [block]
};

}  // namespace qat::ptq
