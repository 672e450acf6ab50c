#include "train/parameters.hpp"

#include <regex>
#include <set>
#include <string_view>

#include "qat/core/error.hpp"

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

TrainedParameters::TrainedParameters(const torch::nn::Module& module,
                                     const std::vector<std::string>& frozen) {
  Freezer freezer(frozen);
  std::set<const c10::TensorImpl*> seen, kept;
  for (const auto& entry : module.named_parameters()) {
    const at::Tensor& value = entry.value();
    const bool first = seen.insert(value.unsafeGetTensorImpl()).second;
    if (!freezer.matches(entry.key()) && first) {
      trained_.push_back({entry.key(), value});
      check_latent(trained_.back());
    }
    if (first) before_.push_back({value, value.requires_grad()});
  }
  freezer.check_all_used();
  if (trained_.empty()) throw ArgumentError("Trainer: model: expected a parameter to train, got none");
  for (const Before& before : before_) {
    if (before.value.is_floating_point()) before.value.set_requires_grad(false);
  }
  for (const NamedParameter& parameter : trained_) parameter.value.set_requires_grad(true);
}

TrainedParameters::~TrainedParameters() {
  for (const Before& before : before_) before.value.set_requires_grad(before.required);
}

std::vector<at::Tensor> TrainedParameters::values() const {
  std::vector<at::Tensor> values;
  for (const NamedParameter& parameter : trained_) values.push_back(parameter.value);
  return values;
}

}  // namespace qat::train
