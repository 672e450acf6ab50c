#include "train/average.hpp"

#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <map>

namespace qat::train {

Average::Average(Training& training) : training_(training) {
  begin_step(0);
}

/// A scale that a change of grid has replaced begins anew.
void Average::begin_step(int64_t /*step*/) {
  const c10::NoGradGuard no_grad;
  std::map<const void*, at::Tensor> known;
  for (const Entry& entry : entries_) known[entry.value.unsafeGetTensorImpl()] = entry.average;
  std::vector<Entry> entries;
  const auto add = [&](const std::string& name, const at::Tensor& value) {
    const auto found = known.find(value.unsafeGetTensorImpl());
    entries.push_back({name, value, found == known.end() ? value.detach().clone() : found->second});
  };
  for (const NamedParameter& parameter : training_.parameters.trained()) add(parameter.name, parameter.value);
  for (const TrainedScale& scale : training_.scales.scales()) add(scale.name, scale.value);
  entries_ = std::move(entries);
}

void Average::after_update(int64_t step) {
  const c10::NoGradGuard no_grad;
  const double weight = std::max(1 - training_.options.ema, 1 / static_cast<double>(step));
  for (Entry& entry : entries_) entry.average.lerp_(entry.value, weight);
}

void Average::add_state(std::vector<StateTensor>& tensors) const {
  for (const Entry& entry : entries_) tensors.push_back({"average/" + entry.name, entry.average});
}

void Average::swap() {
  const c10::NoGradGuard no_grad;
  for (Entry& entry : entries_) {
    const at::Tensor kept = entry.value.detach().clone();
    entry.value.copy_(entry.average);
    entry.average.copy_(kept);
  }
}

}  // namespace qat::train
