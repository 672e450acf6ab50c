#include "qat/ptq/apply.hpp"

#include <ATen/core/grad_mode.h>

#include <utility>

#include "ptq/check.hpp"
#include "ptq/stage_walk.hpp"
#include "qat/ptq/weighted_search.hpp"

namespace qat::ptq {
namespace {

using Solve = std::function<Solution(const StageWeight& weight, const at::Tensor& hessian)>;

RoundedTensor round_weight(const StageWeight& weight, const at::Tensor& hessian, const Solve& solve) {
  const at::Tensor before = rows_of(weight.latent).clone();
  const Solution solution = solve(weight, hessian);
  weight.latent.detach().copy_(solution.latent);
  weight.quantizer->set_field_scales(solution.scales);
  const at::Tensor shipped = rows_of(weight.quantizer->fake_quantize(weight.latent));
  return {weight.name, weight.quantizer->scheme().weight, output_error(before, shipped, hessian)};
}

std::vector<RoundedTensor> apply(const std::string& function, PreparedModel& model,
                                 const std::vector<Stage>& stages, const at::Tensor& windows,
                                 const CalibrationOptions& calibration, const Solve& solve) {
  check_learned(function, model);
  const EnabledScope enabled(model, true);
  const at::NoGradGuard no_grad;
  StageWalk walk(function, model, stages, windows, calibration);
  std::vector<RoundedTensor> done;
  while (walk.stage() != nullptr) {
    std::vector<StageWeight> weights = walk.weights();
    std::erase_if(weights, [](const StageWeight& weight) { return !weight.quantizer; });
    const std::vector<at::Tensor> hessians = walk.advance(weights, calibration.tokens);
    for (size_t i = 0; i < weights.size(); ++i) done.push_back(round_weight(weights[i], hessians[i], solve));
  }
  return done;
}

}  // namespace

std::vector<RoundedTensor> apply_gptq(PreparedModel& model, const std::vector<Stage>& stages,
                                      const at::Tensor& windows, const GptqOptions& options,
                                      const CalibrationOptions& calibration) {
  return apply("apply_gptq", model, stages, windows, calibration,
               [&](const StageWeight& weight, const at::Tensor& hessian) {
                 GptqOptions own = options;
                 own.seq = weight.quantizer->tied();
                 return gptq(weight.latent, hessian, weight.quantizer->scheme().weight, own, weight.name);
               });
}

std::vector<RoundedTensor> apply_weighted_search(PreparedModel& model, const std::vector<Stage>& stages,
                                                 const at::Tensor& windows,
                                                 const CalibrationOptions& calibration) {
  return apply("apply_weighted_search", model, stages, windows, calibration,
               [](const StageWeight& weight, const at::Tensor& hessian) -> Solution {
                 const at::Tensor importance = hessian.diagonal();
                 return {weight.latent,
                         weighted_search(weight.latent, importance, weight.quantizer->scheme().weight,
                                         weight.name, weight.quantizer->tied())};
               });
}

}  // namespace qat::ptq
