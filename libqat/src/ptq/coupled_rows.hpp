#pragma once

// Rows under coordinate descent whose errors count together; see qat/ptq/refine.hpp.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

#include "qat/grid/grid.hpp"

namespace qat::ptq {

/// A group of rows that share a block of the outputs' curvature.
struct CoupledRows {
  const grid::Grid& grid;
  at::Tensor hessian;  ///< float32[N, N], damped
  at::Tensor outputs;  ///< float32[R, R], damped
  at::Tensor weight;   ///< float32[R, N]
  at::Tensor latent;   ///< float32[R, N], of the start; becomes the result's
  at::Tensor scales;   ///< float32[R, G, P], likewise
  bool hold_scales;    ///< only codes move
};

/// Where it ended: kOk, or what is wrong with the group's row `row`.
struct RowStatus {
  grid::Status status = grid::Status::kOk;
  int64_t row = -1;
};

/// Sweeps over all rows, one after the other. No change raises tr(G E H E^T) of the errors E = W - W^.
RowStatus refine_together(const CoupledRows& rows, int64_t sweeps);

}  // namespace qat::ptq
