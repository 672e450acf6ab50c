#pragma once

// One weight of a model becomes what a method found for it.

#include <functional>
#include <string>

#include "ptq/stage_walk.hpp"
#include "qat/ptq/apply.hpp"
#include "qat/ptq/gptq.hpp"

namespace qat::ptq {

/// rows: float32[r, ...] of the weight `name`, hessian: float64[N, N], quantizer: the weight's.
using Solve = std::function<Solution(const at::Tensor& rows, const at::Tensor& hessian,
                                     const Quantizer& quantizer, const std::string& name)>;

/// Puts the method's latents and scales in the place of the weight's. Large tables are solved in parts, so
/// that the memory beside the weight is that of a part; an error leaves the parts before it rounded.
RoundedTensor round_weight(const StageWeight& weight, const at::Tensor& hessian, const Solve& solve);

}  // namespace qat::ptq
