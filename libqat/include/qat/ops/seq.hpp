#pragma once

// The scales of stretched elastic quantization (the scale rule kSeq; qat/grid/seq.hpp): few free parameters,
// from which the scales follow that the other operators take, with the rule kLearned. Legend in
// qat/ops/ops.hpp; F free parameters per block. Grids that hold SEQ only; ArgumentError that lists them
// otherwise.

#include <ATen/core/Tensor.h>

#include <string_view>

#include "qat/core/scheme.hpp"

namespace qat::ops {

/// The tied scales. free: float32[R, G, F] -> float32[R, G, P]; the rounding of the free parameters passes
/// straight through to their gradient.
at::Tensor seq_tie(const at::Tensor& free, std::string_view grid, std::string_view tensor = "");

/// dL/dfree from dL/dscales. grad: float32[R, G, P] -> float32[R, G, F].
at::Tensor seq_tie_backward(const at::Tensor& grad, std::string_view grid, std::string_view tensor = "");

/// Free parameters that `seq_tie` takes to these scales. scales: float32[R, G, P] -> float32[R, G, F].
/// ArgumentError for scales that are not tied. A plain function without a gradient.
at::Tensor seq_untie(const at::Tensor& scales, std::string_view grid, std::string_view tensor = "");

/// Where the free parameters start: by kReference at the paper's max|w|, by kSearch at the least squared
/// error. weight: float32[R, ...] -> float32[R, G, F]. Without a gradient.
at::Tensor seq_start(const at::Tensor& weight, std::string_view grid, ScaleRule from = ScaleRule::kSearch,
                     std::string_view tensor = "");

/// F of that grid; 0 where it cannot hold SEQ.
int64_t seq_params(std::string_view grid);

/// Throws ArgumentError, listing all grids that hold SEQ, for another one that has scales.
void check_seq(std::string_view grid, std::string_view tensor = "");

}  // namespace qat::ops
