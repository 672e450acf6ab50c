#include "train/parameters.hpp"

#include <algorithm>
#include <regex>
#include <set>
#include <string_view>

#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/seq.hpp"
#include "qat/ops/ops.hpp"

namespace qat::train {
namespace {

/// Which parameters stay as they are.
class Freezer {
 public:
  explicit Freezer(const std::vector<std::string>& expressions) : expressions_(expressions) {
    for (const std::string& expression : expressions)
      compiled_.emplace_back(expression, std::regex::ECMAScript);
    used_.resize(expressions.size());
  }

  bool matches(const std::string& name) {
    constexpr std::string_view kSuffix = ".weight";
    const std::string stem = name.ends_with(kSuffix) ? name.substr(0, name.size() - kSuffix.size()) : name;
    bool any = false;
    for (std::size_t i = 0; i < compiled_.size(); ++i) {
      if (!std::regex_match(name, compiled_[i]) && !std::regex_match(stem, compiled_[i])) continue;
      used_[i] = any = true;
    }
    return any;
  }

  void check_all_used() const {
    for (std::size_t i = 0; i < used_.size(); ++i) {
      if (used_[i]) continue;
      throw ArgumentError("Trainer: options: frozen[" + std::to_string(i) +
                          "]: expected an expression that matches a parameter, got \"" + expressions_[i] +
                          "\"");
    }
  }

 private:
  const std::vector<std::string>& expressions_;
  std::vector<std::regex> compiled_;
  std::vector<bool> used_;
};

void check_latent(const NamedParameter& parameter) {
  if (parameter.value.scalar_type() == at::kFloat) return;
  throw ArgumentError("Trainer: " + parameter.name +
                      ": expected a float32 latent (or a frozen parameter), got " +
                      c10::toString(parameter.value.scalar_type()));
}

}  // namespace

TrainedParameters::TrainedParameters(PreparedModel& model, const Options& options)
    : model_(model), scales_train_(options.scale_learning_rate > 0) {
  Freezer freezer(options.frozen);
  std::set<const c10::TensorImpl*> seen;
  for (const auto& entry : model.module().named_parameters()) {
    const at::Tensor& value = entry.value();
    const bool first = seen.insert(value.unsafeGetTensorImpl()).second;
    if (!freezer.matches(entry.key()) && first) {
      trained_.push_back({entry.key(), value});
      check_latent(trained_.back());
    }
    if (first) before_.push_back({value, value.requires_grad()});
  }
  for (const NamedTensor& scale : model.scale_parameters()) {
    if (freezer.matches(scale.name)) held_scales_.push_back(scale.name);
    before_.push_back({scale.value, scale.value.requires_grad()});
  }
  freezer.check_all_used();
  if (trained_.empty()) throw ArgumentError("Trainer: model: expected a parameter to train, got none");
  for (const Before& before : before_) {
    if (before.value.is_floating_point()) before.value.set_requires_grad(false);
  }
  for (const NamedParameter& parameter : trained_) parameter.value.set_requires_grad(true);
}

TrainedParameters::~TrainedParameters() {
  for (const NamedTensor& scale : model_.scale_parameters()) scale.value.set_requires_grad(true);
  for (const Before& before : before_) before.value.set_requires_grad(before.required);
}

std::vector<at::Tensor> TrainedParameters::values() const {
  std::vector<at::Tensor> values;
  for (const NamedParameter& parameter : trained_) values.push_back(parameter.value);
  return values;
}

bool TrainedParameters::trains(const std::string& name) const {
  return std::any_of(trained_.begin(), trained_.end(),
                     [&](const NamedParameter& parameter) { return parameter.name == name; });
}

std::vector<TrainedScale> TrainedParameters::scales() {
  std::vector<TrainedScale> scales;
  for (std::size_t i = 0; i < model_.slots().size(); ++i) {
    const auto& quantizer = model_.quantizers()[i];
    if (!quantizer || !quantizer->scales().defined()) continue;
    const std::string name = model_.slots()[i].name + "_scales";
    const bool held = std::find(held_scales_.begin(), held_scales_.end(), name) != held_scales_.end();
    const bool train = scales_train_ && !held && trains(model_.slots()[i].name);
    quantizer->scales().set_requires_grad(train);
    if (train) scales.push_back({name, quantizer->scales(), parameter_sizes(*quantizer)});
  }
  for (const auto& activation : model_.activations()) {
    if (!activation->learned()) continue;
    const std::string& name = activation->name();
    const bool held = std::find(held_scales_.begin(), held_scales_.end(), name) != held_scales_.end();
    activation->scale().set_requires_grad(scales_train_ && !held);
    if (activation->scale().requires_grad()) scales.push_back({name, activation->scale(), {1}});
  }
  return scales;
}

std::vector<TrainedWeight> trained_weights(const PreparedModel& model) {
  std::vector<TrainedWeight> weights;
  for (std::size_t i = 0; i < model.slots().size(); ++i) {
    const auto& quantizer = model.quantizers()[i];
    if (!quantizer || grid::find(quantizer->scheme().weight).info().is_float) continue;
    const at::Tensor latent = model.slots()[i].get();
    if (latent.requires_grad()) weights.push_back({model.slots()[i].name, latent, quantizer});
  }
  return weights;
}

at::Tensor where_in_range(const TrainedWeight& weight, const at::Tensor& gradient) {
  const Quantizer& quantizer = *weight.quantizer;
  ScaleRule rule = quantizer.estimator().scale;
  if (rule == ScaleRule::kDifferentiated) rule = ScaleRule::kReference;  // the same scales, a plain mask
  if (is_learned(rule)) rule = ScaleRule::kLearned;
  const at::Tensor scales = quantizer.scales().defined() ? quantizer.field_scales().detach() : at::Tensor();
  return ops::fake_quantize_backward(quantizer.matrix(gradient), quantizer.matrix(weight.latent.detach()),
                                     grid_of(quantizer), {EstimatorKind::kClippedSte, rule}, weight.name,
                                     scales)
      .view_as(gradient);
}

std::vector<int> field_sizes(const grid::Grid& grid) {
  std::vector<int> sizes;
  for (const grid::Field& field : grid.info().fields) sizes.push_back(field.count);
  return sizes;
}

std::vector<int> parameter_sizes(const Quantizer& quantizer) {
  const grid::Grid& grid = grid::find(grid_of(quantizer));
  return quantizer.tied() ? grid::seq_groups(grid) : field_sizes(grid);
}

const std::string& grid_of(const Quantizer& quantizer) {
  return quantizer.training_grid().empty() ? quantizer.scheme().weight : quantizer.training_grid();
}

}  // namespace qat::train
