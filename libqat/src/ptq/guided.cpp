#include "qat/ptq/guided.hpp"

#include "ptq/stage_walk.hpp"
#include "qat/ptq/sensitivity.hpp"

namespace qat::ptq {

std::vector<RoundedTensor> apply_guided(PreparedModel& model, const std::vector<Stage>& stages,
                                        const std::function<at::Tensor(const at::Tensor& tokens)>& logits,
                                        const at::Tensor& windows, const GuidedOptions& options,
                                        const CalibrationOptions& calibration) {
  check_learned("apply_guided", model);  // before the backward pass, which takes minutes
  CalibrationOptions weighted = calibration;
  Sensitivity found = sensitivity(model, logits, windows, options.seed, 2, calibration.progress);
  weighted.tokens = std::move(found.tokens);
  weighted.lookups = std::move(found.lookups);
  weighted.outputs = std::move(found.outputs);
  weighted.input_correction = options.input_correction;
  return apply_gptq(model, stages, windows, options.gptq, weighted);
}

}  // namespace qat::ptq
