#pragma once

// The weights that ship: latents rounded under held scales by the grid itself.

#include <ATen/ops/empty_like.h>

#include <string>

#include "catch.hpp"
#include "qat/grid/grid.hpp"
#include "qat/ptq/gptq.hpp"

/// solution: of a matrix, with scales of each row -> float32[R, N].
inline at::Tensor decoded(const qat::ptq::Solution& solution, const std::string& name) {
  const qat::grid::Grid& grid = qat::grid::find(name);
  at::Tensor result = at::empty_like(solution.latent);
  const int64_t n = result.size(1);
  for (int64_t row = 0; row < result.size(0); ++row) {
    REQUIRE(grid.fake_quantize_with(solution.latent[row].const_data_ptr<float>(), n,
                                    solution.scales[row].const_data_ptr<float>(),
                                    result[row].mutable_data_ptr<float>()) == qat::grid::Status::kOk);
  }
  return result;
}
