#pragma once

// The stored form of a tensor and the way back. Legend in qat/ops/ops.hpp.

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "qat/core/scheme.hpp"

namespace qat::ops {

/// Throws ArgumentError, listing all names, when there is no grid of that name.
void check_grid(std::string_view grid);

/// P, the scale parameters per block of that grid; 0 where it has none.
int64_t scale_params(std::string_view grid);

/// weight: float32[R, ...] -> codes: int8[R, N], scales: float32[R, G, P] after `store`. Integer grids only.
/// dequantize(quantize(w)) equals fake_quantize(w) of the same scale rule bit for bit. The results carry no
/// gradient.
std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& weight, std::string_view grid,
                                            ScaleRule scale = ScaleRule::kReference,
                                            std::string_view tensor = "", const at::Tensor& scales = {});

/// What the rule (any but kLearned) gives before `store`: float32[R, G, P], a start for learned scales.
/// quantize(w, kLearned, choose_scales(w, rule)) equals quantize(w, rule). weight: float32[R, ...]; integer
/// grids only. Without a gradient.
at::Tensor choose_scales(const at::Tensor& weight, std::string_view grid,
                         ScaleRule scale = ScaleRule::kSearch, std::string_view tensor = "");

/// codes: int8[R, N], scales: float32[R, G, P] -> float32[R, N]. ArgumentError for codes outside the grid.
at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, std::string_view grid,
                      std::string_view tensor = "");

}  // namespace qat::ops
