#include "train/diagnosis.hpp"

#include <cstdio>

namespace qat::train {
namespace {

constexpr double kManyFlips = 0.05, kGradientGrowth = 3, kManyClipped = 0.1, kLargeDrift = 0.5;
constexpr double kManyEpochs = 3, kFewTokens = 10000;

std::string format(const char* pattern, double a, double b = 0) {
  char text[160];
  std::snprintf(text, sizeof text, pattern, a, b);
  return text;
}

/// The causes that the facts speak for, the most likely first.
std::vector<std::string> causes(const RunFacts& facts) {
  std::vector<std::string> found;
  if (facts.flip_rate > kManyFlips) {
    found.push_back(
        format("%.0f %% of the codes changed from one measurement to the next: the learning rate is "
               "too high",
               100 * facts.flip_rate));
  }
  if (facts.gradient_last > kGradientGrowth * facts.gradient_start) {
    found.push_back(format("the gradient norm grew from %.3g to %.3g: the learning rate is too high",
                           facts.gradient_start, facts.gradient_last));
  }
  if (facts.scale_drift > kLargeDrift) {
    found.push_back(format("the scales moved by %.0f %% of their size: scale_learning_rate is too high",
                           100 * facts.scale_drift));
  }
  if (facts.clip_rate > kManyClipped) {
    found.push_back(
        format("%.0f %% of the weights lie beyond the range of their scale: their scales are too "
               "small",
               100 * facts.clip_rate));
  }
  if (facts.epochs > kManyEpochs) {
    found.push_back(format("the text was read %.1f times: it is too short", facts.epochs));
  }
  if (facts.tokens < kFewTokens) {
    found.push_back(format("it trained on %.0f tokens only: more steps are needed", facts.tokens));
  }
  if (found.empty()) found.emplace_back("nothing in telemetry stands out; try a lower learning rate");
  return found;
}

}  // namespace

std::vector<std::string> diagnose(const RunFacts& facts) {
  if (facts.probe_start < 0 || facts.probe_last <= facts.probe_start) return {};
  std::string warning = format(
      "training made the model worse: KL to the float model is %.4f on the probe "
      "batch and was %.4f before the first step",
      facts.probe_last, facts.probe_start);
  const char* separator = ". Likely: ";
  for (const std::string& cause : causes(facts)) {
    warning += separator + cause;
    separator = "; ";
  }
  return {warning};
}

}  // namespace qat::train
