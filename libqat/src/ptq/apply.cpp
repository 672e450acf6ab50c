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

  StageWalk walk() const { return {function, model, stages, windows, calibration}; }
};

/// Rounds tables that are also heads, by what the float head multiplies and what the place needs where their
/// rows are looked up; before all other weights, which then get the rounded rows.
void round_tables(const Job& job, std::vector<RoundedTensor>& done) {
  std::vector<StageWeight> tables;
  std::vector<at::Tensor> hessians;
  {
    const EnabledScope as_float(job.model, false);
    StageWalk walk = job.walk();
    while (!walk.stage()->tied) walk.advance(/*measure=*/false);
    tables = walk.weights_to_round();
    hessians = walk.advance(tables, job.calibration.tokens);
  }
  for (size_t i = 0; i < tables.size(); ++i) {
    const auto lookup = job.calibration.lookups.find(tables[i].name);
    if (lookup != job.calibration.lookups.end()) hessians[i] = hessians[i] + lookup->second;
    done.push_back(round_weight(tables[i], hessians[i], job.solve));
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
    const std::vector<at::Tensor> hessians = walk.advance(weights, job.calibration.tokens);
    for (size_t i = 0; i < weights.size(); ++i)
      done.push_back(round_weight(weights[i], hessians[i], job.solve));
  }
  return done;
}

}  // namespace

std::vector<RoundedTensor> apply_gptq(PreparedModel& model, const std::vector<Stage>& stages,
                                      const at::Tensor& windows, const GptqOptions& options,
                                      const CalibrationOptions& calibration) {
  const Solve solve = [&](const at::Tensor& rows, const at::Tensor& hessian, const Quantizer& quantizer,
                          const std::string& name) {
    GptqOptions own = options;
    own.seq = quantizer.tied();
    return gptq(rows, hessian, quantizer.scheme().weight, own, name);
  };
  return apply({"apply_gptq", model, stages, windows, calibration, solve});
}

std::vector<RoundedTensor> apply_weighted_search(PreparedModel& model, const std::vector<Stage>& stages,
                                                 const at::Tensor& windows,
                                                 const CalibrationOptions& calibration) {
  const Solve solve = [](const at::Tensor& rows, const at::Tensor& hessian, const Quantizer& quantizer,
                         const std::string& name) -> Solution {
    return {rows,
            weighted_search(rows, hessian.diagonal(), quantizer.scheme().weight, name, quantizer.tied())};
  };
  return apply({"apply_weighted_search", model, stages, windows, calibration, solve});
}

}  // namespace qat::ptq
