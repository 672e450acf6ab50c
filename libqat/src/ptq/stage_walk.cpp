#include "ptq/stage_walk.hpp"

#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "ptq/check.hpp"
#include "qat/grid/grid.hpp"

namespace qat::ptq {
namespace {

/// Of 6 bits. With 8, the error of a table is a thousandth of what the rounded blocks add, and a vocabulary's
/// rows take long.
constexpr int kMostTableLevels = 64;

}  // namespace

StageWalk::StageWalk(std::string function, PreparedModel& model, const std::vector<Stage>& stages,
                     const at::Tensor& windows, const CalibrationOptions& calibration)
    : function_(std::move(function)), model_(model), stages_(stages), calibration_(calibration) {
  if (windows.scalar_type() != at::kLong || windows.dim() != 2 || windows.numel() == 0) {
    fail({function_, "windows"}, "int64[n, T] of at least one token", describe(windows));
  }
  if (calibration_.batch < 1) fail({function_, "batch"}, "at least 1", std::to_string(calibration_.batch));
  for (const at::Tensor& batch : windows.split(calibration_.batch)) states_.push_back({batch});
  shape_ = windows.sizes().vec();
}

std::vector<StageWeight> StageWalk::weights_of(const Stage& stage) const {
  std::vector<StageWeight> found;
  for (const std::string& name : stage.weights) {
    for (size_t i = 0; i < model_.slots().size(); ++i) {
      const Slot& slot = model_.slots()[i];
      if (slot.name == name) found.push_back({name, slot.get(), model_.quantizers()[i]});
    }
    if (found.empty() || found.back().name != name) {
      fail({function_, name}, "a slot of the prepared model", "none of that name");
    }
  }
  return found;
}

std::vector<StageWeight> StageWalk::to_round(const Stage& stage) const {
  std::vector<StageWeight> found = weights_of(stage);
  std::erase_if(found, [&](const StageWeight& weight) {
    if (!weight.quantizer) return true;
    const grid::Info& info = grid::find(weight.quantizer->scheme().weight).info();
    return stage.tied && info.code_max - info.code_min >= kMostTableLevels;
  });
  return found;
}

bool StageWalk::rounds_tables() const {
  return std::any_of(stages_.begin(), stages_.end(),
                     [&](const Stage& stage) { return stage.tied && !to_round(stage).empty(); });
}

/// visit(first window of the batch, what the stage left of it)
template <class Visit>
void StageWalk::run_next(const Visit& visit) {
  const at::NoGradGuard no_grad;
  const Stage& stage = stages_[next_++];
  const auto total = static_cast<int64_t>(stages_.size() * states_.size());
  int64_t first = 0;
  for (std::vector<at::Tensor>& state : states_) {
    state = stage.run(state);
    visit(first, state.back());
    first += calibration_.batch;
    ++done_;
    if (calibration_.progress) {
      calibration_.progress(done_, total, stage.weights.empty() ? "" : stage.weights.front());
    }
  }
}

std::optional<InputMoments> StageWalk::advance(bool measure) {
  std::optional<InputMoments> moments;
  run_next([&](int64_t, const at::Tensor& input) {
    if (!measure) return;
    if (!moments) moments.emplace(input.size(-1));
    moments->add(input);
  });
  return moments;
}

std::vector<at::Tensor> StageWalk::advance(const std::vector<StageWeight>& weights,
                                           const TokenWeights& tokens) {
  std::vector<at::Tensor> counts;
  bool alike = true;
  for (const StageWeight& weight : weights) {
    const auto found = tokens.find(weight.name);
    counts.push_back(found == tokens.end() ? at::Tensor() : found->second);
    if (!counts.back().defined()) continue;
    alike = false;
    if (counts.back().sizes() != at::IntArrayRef(shape_)) {
      fail({function_, weight.name}, "a weight for each token of the windows", describe(counts.back()));
    }
  }
  if (alike) {
    const auto moments = advance(!weights.empty());
    return std::vector<at::Tensor>(weights.size(), moments ? moments->second() : at::Tensor());
  }
  std::vector<InputMoments> moments;
  run_next([&](int64_t first, const at::Tensor& input) {
    for (size_t i = 0; i < weights.size(); ++i) {
      if (moments.size() <= i) moments.emplace_back(input.size(-1));
      moments[i].add(input, counts[i].defined() ? counts[i].narrow(0, first, input.size(0)) : at::Tensor());
    }
  });
  std::vector<at::Tensor> hessians;
  for (const InputMoments& moment : moments) hessians.push_back(moment.second());
  return hessians;
}

EnabledScope::EnabledScope(PreparedModel& model, bool enabled) {
  for (const auto& quantizer : model.quantizers()) {
    if (!quantizer) continue;
    before_.emplace_back(quantizer, quantizer->enabled());
    quantizer->set_enabled(enabled);
  }
}

EnabledScope::~EnabledScope() {
  for (const auto& [quantizer, enabled] : before_) quantizer->set_enabled(enabled);
}

void check_learned(const std::string& function, const PreparedModel& model) {
  for (const auto& quantizer : model.quantizers()) {
    if (quantizer && !quantizer->learned()) {
      fail({function, quantizer->tensor()}, "a policy with learned scales, which hold the result",
           "scale \"" + std::string(to_string(quantizer->estimator().scale)) + "\"");
    }
  }
}

}  // namespace qat::ptq
