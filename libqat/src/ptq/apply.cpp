#include "qat/ptq/apply.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <utility>

#include "ptq/check.hpp"
#include "ptq/round_weight.hpp"
#include "ptq/stage_walk.hpp"
#include "qat/ptq/weighted_search.hpp"

namespace qat::ptq {
namespace {

/// One call of `apply`.
struct Job {
  std::string function;
  PreparedModel& model;
  const std::vector<Stage>& stages;
  const at::Tensor& windows;
  const CalibrationOptions& calibration;
  const Solve& solve;
  double damping = 0.0;

  StageWalk walk() const { return {function, model, stages, windows, calibration}; }
  RoundedTensor round(const StageWeight& weight, LayerMoments moments) const {
    Evidence evidence{std::move(moments), {}, calibration.input_correction, damping};
    const auto outputs = calibration.outputs.find(weight.name);
    if (outputs != calibration.outputs.end()) evidence.outputs = outputs->second;
    return round_weight(weight, evidence, solve);
  }
  RoundedTensor round_stack(const StageWeight& weight, const StageWalk& walk) const {
    return ptq::round_stack(weight, [&](int64_t expert) { return walk.expert_moments(expert); }, solve);
  }
};

/// Rounds tables that are also heads, by what the float head multiplies and what the place needs where their
/// rows are looked up; before all other weights, which then get the rounded rows.
void round_tables(const Job& job, std::vector<RoundedTensor>& done) {
  std::vector<StageWeight> tables;
  std::vector<LayerMoments> moments;
  {
    const EnabledScope as_float(job.model, false);
    CalibrationOptions float_inputs = job.calibration;
    float_inputs.input_correction = 0.0;
    StageWalk walk(job.function, job.model, job.stages, job.windows, float_inputs);
    while (!walk.stage()->tied) walk.advance(/*measure=*/false);
    tables = walk.weights_to_round();
    moments = walk.advance(tables);
  }
  for (size_t i = 0; i < tables.size(); ++i) {
    const auto lookup = job.calibration.lookups.find(tables[i].name);
    at::Tensor hessian = moments[i].hessian;
    if (lookup != job.calibration.lookups.end()) hessian = hessian + lookup->second;
    done.push_back(job.round(tables[i], {hessian, {}}));
  }
}

std::vector<RoundedTensor> apply(const Job& job) {
  check_learned(job.function, job.model);
  const EnabledScope enabled(job.model, true);
  const at::NoGradGuard no_grad;
  std::vector<RoundedTensor> done;
  StageWalk walk = job.walk();
  if (walk.rounds_tables()) round_tables(job, done);
  while (walk.stage() != nullptr) {
    const std::vector<StageWeight> weights =
        walk.stage()->tied ? std::vector<StageWeight>() : walk.weights_to_round();
    const bool experts = walk.stage()->experts > 0;
    const std::vector<LayerMoments> moments = walk.advance(weights);
    for (size_t i = 0; i < weights.size(); ++i) {
      done.push_back(experts ? job.round_stack(weights[i], walk) : job.round(weights[i], moments[i]));
    }
  }
  return done;
}

}  // namespace

std::vector<RoundedTensor> apply_gptq(PreparedModel& model, const std::vector<Stage>& stages,
                                      const at::Tensor& windows, const GptqOptions& options,
                                      const CalibrationOptions& calibration) {
  const Solve solve = [&](const Part& part) {
    GptqOptions own = options;
    own.seq = part.quantizer.tied();
    if (part.outputs.defined()) own.outputs = part.outputs;
    return gptq(part.rows, part.hessian, part.quantizer.scheme().weight, own, part.name);
  };
  return apply({"apply_gptq", model, stages, windows, calibration, solve, options.damping});
}

std::vector<RoundedTensor> apply_weighted_search(PreparedModel& model, const std::vector<Stage>& stages,
                                                 const at::Tensor& windows,
                                                 const CalibrationOptions& calibration) {
  const Solve solve = [](const Part& part) -> Solution {
    return {part.rows, weighted_search(part.rows, part.hessian.diagonal(), part.quantizer.scheme().weight,
                                       part.name, part.quantizer.tied())};
  };
  return apply({"apply_weighted_search", model, stages, windows, calibration, solve});
}

}  // namespace qat::ptq
