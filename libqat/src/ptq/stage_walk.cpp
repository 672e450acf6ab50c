#include "ptq/stage_walk.hpp"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <numeric>

#include "ptq/check.hpp"
#include "qat/grid/grid.hpp"

namespace qat::ptq {
namespace {

/// Of 6 bits. With 8, the error of a table is a thousandth of what the rounded blocks add, and a vocabulary's
/// rows take long.
constexpr int kMostTableLevels = 64;

bool is_float(const Quantizer& quantizer) {
  return grid::find(quantizer.scheme().weight).info().is_float;
}

}  // namespace

bool StageWeight::has_codes() const {
  return quantizer && !is_float(*quantizer);
}

StageWalk::StageWalk(std::string function, PreparedModel& model, const std::vector<Stage>& stages,
                     const at::Tensor& windows, const CalibrationOptions& calibration)
    : function_(std::move(function)), model_(model), stages_(stages), calibration_(calibration) {
  if (windows.scalar_type() != at::kLong || windows.dim() != 2 || windows.numel() == 0) {
    fail({function_, "windows"}, "int64[n, T] of at least one token", describe(windows));
  }
  if (calibration_.batch < 1) fail({function_, "batch"}, "at least 1", std::to_string(calibration_.batch));
  if (!(calibration_.input_correction >= 0.0 && calibration_.input_correction <= 1.0)) {
    fail({function_, "input_correction"}, "a share between 0 and 1",
         std::to_string(calibration_.input_correction));
  }
  for (const at::Tensor& batch : windows.split(calibration_.batch)) states_.push_back({batch});
  if (calibration_.input_correction > 0.0) float_states_ = states_;
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
    if (!weight.has_codes()) return true;
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

std::vector<at::Tensor> StageWalk::token_weights(const std::vector<StageWeight>& weights) const {
  std::vector<at::Tensor> counts;
  for (const StageWeight& weight : weights) {
    const auto found = calibration_.tokens.find(weight.name);
    counts.push_back(found == calibration_.tokens.end() ? at::Tensor() : found->second);
    if (counts.back().defined() && counts.back().sizes() != at::IntArrayRef(shape_)) {
      fail({function_, weight.name}, "a weight for each token of the windows", describe(counts.back()));
    }
  }
  return counts;
}

/// The stage on the float model: what it applies are the weights of the stage before.
void StageWalk::run_float(const Stage& stage) {
  const at::NoGradGuard no_grad;
  const EnabledScope as_float(model_, false);
  std::vector<at::Tensor> rounded;
  for (const auto& [latent, original] : originals_) {
    rounded.push_back(latent.detach().clone());
    latent.detach().copy_(original);
  }
  for (std::vector<at::Tensor>& state : float_states_) state = stage.run(state);
  for (size_t i = 0; i < rounded.size(); ++i) originals_[i].first.detach().copy_(rounded[i]);
  originals_.clear();
}

std::vector<LayerMoments> StageWalk::advance(const std::vector<StageWeight>& weights) {
  const std::vector<at::Tensor> counts = token_weights(weights);
  if (!float_states_.empty()) run_float(stages_[next_]);
  const bool alike =
      std::none_of(counts.begin(), counts.end(), [](const auto& one) { return one.defined(); });
  // One entry for all weights of the stage where they have the same moments.
  size_t distinct = alike ? std::min<size_t>(1, weights.size()) : weights.size();
  const bool experts = stages_[next_].experts > 0;
  if (experts) distinct = 0;
  std::vector<InputMoments> moments;
  std::vector<InputDrift> drifts;
  run_next([&](int64_t first, const at::Tensor& input) {
    for (size_t i = 0; i < distinct; ++i) {
      if (moments.size() <= i) {
        moments.emplace_back(input.size(-1));
        drifts.emplace_back(float_states_.empty() ? 0 : input.size(-1));
      }
      const at::Tensor count = counts[i].defined() ? counts[i].narrow(0, first, input.size(0)) : at::Tensor();
      moments[i].add(input, count);
      if (!float_states_.empty()) {
        drifts[i].add(float_states_[first / calibration_.batch].back(), input, count);
      }
    }
  });
  if (!float_states_.empty()) {
    for (const StageWeight& weight : weights) {
      originals_.emplace_back(weight.latent, weight.latent.detach().clone());
    }
  }
  std::vector<LayerMoments> found;
  for (size_t i = 0; i < distinct; ++i) {
    found.push_back({moments[i].second(), float_states_.empty() ? at::Tensor() : drifts[i].mean()});
  }
  if (!experts && !found.empty()) found.resize(weights.size(), found.front());
  return found;
}

std::optional<LayerMoments> StageWalk::expert_moments(int64_t expert) const {
  std::optional<InputMoments> moments;
  for (const std::vector<at::Tensor>& state : states_) {
    const at::Tensor& input = state.back();
    const int64_t* counts = state.end()[-2].const_data_ptr<int64_t>();
    if (counts[expert] == 0) continue;
    if (!moments) moments.emplace(input.size(-1));
    moments->add(input.narrow(0, std::accumulate(counts, counts + expert, int64_t{0}), counts[expert]));
  }
  if (!moments) return std::nullopt;
  return LayerMoments{moments->second(), {}};
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
    if (quantizer && !quantizer->learned() && !is_float(*quantizer)) {
      fail({function, quantizer->tensor()}, "a policy with learned scales, which hold the result",
           "scale \"" + std::string(to_string(quantizer->estimator().scale)) + "\"");
    }
  }
}

}  // namespace qat::ptq
