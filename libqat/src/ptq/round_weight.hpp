#pragma once

// One weight of a model becomes what a method found for it.

#include <functional>
#include <optional>
#include <string>

#include "ptq/stage_walk.hpp"
#include "qat/ptq/apply.hpp"
#include "qat/ptq/gptq.hpp"

namespace qat::ptq {

/// Some rows of a weight.
struct Part {
  at::Tensor rows;            ///< float32[r, ...]
  const at::Tensor& hessian;  ///< float64[N, N]
  at::Tensor outputs;         ///< see RefineOptions; undefined where the weight has none
  const Quantizer& quantizer;
  std::string name;
};

/// What is known of a weight beside its values.
struct Evidence {
  LayerMoments moments;
  at::Tensor outputs = {};  ///< see OutputCurvatures
  double correction = 0.0;  ///< see CalibrationOptions::input_correction
  double damping = 0.0;     ///< of the Hessian in the correction
};

using Solve = std::function<Solution(const Part& part)>;

/// Puts the method's latents and scales in the place of the weight's. Large tables are solved in parts, so
/// that the memory beside the weight is that of a part; an error leaves the parts before it rounded.
RoundedTensor round_weight(const StageWeight& weight, const Evidence& evidence, const Solve& solve);

/// The same for a stack of experts, [E, O, I]: `moments` gives what is known of one expert's inputs. Those
/// that it gives nothing for stay as they are.
RoundedTensor round_stack(const StageWeight& weight,
                          const std::function<std::optional<LayerMoments>(int64_t expert)>& moments,
                          const Solve& solve);

}  // namespace qat::ptq
