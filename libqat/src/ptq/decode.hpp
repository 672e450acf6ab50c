#pragma once

#include <ATen/core/Tensor.h>

#include "qat/grid/grid.hpp"

namespace qat::ptq {

/// What ships: latents on the grid under held scales. latent: contiguous float32[R, N]; scales: float32[R, G,
/// P] or [1, 1, P]. NumericError naming the row.
at::Tensor decoded(std::string_view function, std::string_view tensor, const grid::Grid& grid,
                   const at::Tensor& latent, const at::Tensor& scales);

}  // namespace qat::ptq
