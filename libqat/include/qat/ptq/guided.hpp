#pragma once

// GPTQ in which a token counts as much as the model's answer depends on it, refined afterwards: what
// runs on 3 bits and more start from.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "qat/prepare/prepare.hpp"
#include "qat/ptq/apply.hpp"
#include "qat/ptq/gptq.hpp"
#include "qat/quantizer/stage.hpp"

namespace qat::ptq {

/// Settings of `apply_guided`; Python uses the same names.
struct GuidedOptions {
  /// More damping than plain GPTQ, because weighted tokens are fewer tokens; four sweeps of `refine`, because
  /// later ones change next to nothing.
  GptqOptions gptq = {.damping = 0.1, .sweeps = 4};
  double input_correction = 0.5;  ///< see input_correction.hpp
  int64_t seed = 0;               ///< of the labels that the model draws, see token_sensitivity
};

/// token_sensitivity on `windows`, then apply_gptq with these weights. logits: as for token_sensitivity; the
/// other arguments, errors and what becomes of the model as for apply_gptq. Tokens, lookups, outputs and
/// input correction of `calibration` are the ones found and those of `options`, whatever it holds; its
/// progress counts the windows of the first part, then the weights.
std::vector<RoundedTensor> apply_guided(PreparedModel& model, const std::vector<Stage>& stages,
                                        const std::function<at::Tensor(const at::Tensor& tokens)>& logits,
                                        const at::Tensor& windows, const GuidedOptions& options = {},
                                        const CalibrationOptions& calibration = {});

}  // namespace qat::ptq
