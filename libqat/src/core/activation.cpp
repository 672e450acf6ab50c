#include "qat/core/activation.hpp"

#include <algorithm>
#include <array>
#include <string>

#include "qat/core/error.hpp"

namespace qat {
namespace {

constexpr std::array kFormats{kInt8TensorStatic, kInt8Token, kQ8_0};

}  // namespace

std::vector<std::string_view> activation_formats() {
  return {kFormats.begin(), kFormats.end()};
}

void check_activation_format(std::string_view format) {
  if (std::find(kFormats.begin(), kFormats.end(), format) != kFormats.end()) return;
  std::string legal;
  for (const std::string_view name : kFormats) legal.append(legal.empty() ? "" : ", ").append(name);
  throw ArgumentError("activation: expected one of " + legal + ", got \"" + std::string(format) + "\"");
}

std::string_view to_string(ActivationRule rule) noexcept {
  return rule == ActivationRule::kLearned ? "learned" : "observed";
}

ActivationRule activation_rule(std::string_view name) {
  for (const ActivationRule rule : {ActivationRule::kObserved, ActivationRule::kLearned}) {
    if (to_string(rule) == name) return rule;
  }
  throw ArgumentError("activation_scales: expected one of observed, learned, got \"" + std::string(name) +
                      "\"");
}

}  // namespace qat
