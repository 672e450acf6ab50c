#include "qat/train/options.hpp"

#include <cmath>
#include <regex>
#include <sstream>

#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "train/options_check.hpp"

namespace qat::train {
namespace {

std::string text(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

void at_least(const char* name, int64_t value, int64_t least) {
  if (value < least) fail_option(name, "at least " + std::to_string(least), std::to_string(value));
}

/// Also refuses NaN, for which every comparison is false.
void require(bool ok, const char* name, const char* range, double value) {
  if (!ok || !std::isfinite(value)) fail_option(name, range, text(value));
}

void validate_objective(const Objective& objective) {
  const auto weight = [](const char* name, double value) {
    require(value >= 0, name, "a weight >= 0", value);
  };
  weight("objective.kl", objective.kl);
  weight("objective.ce", objective.ce);
  weight("objective.reverse_kl", objective.reverse_kl);
  weight("objective.jsd", objective.jsd);
  weight("objective.cakld", objective.cakld);
  require(objective.jsd_alpha > 0 && objective.jsd_alpha < 1, "objective.jsd_alpha",
          "a number between 0 and 1", objective.jsd_alpha);
  require(objective.cakld_beta == -1 || (objective.cakld_beta >= 0 && objective.cakld_beta <= 1),
          "objective.cakld_beta", "a number in [0, 1], or -1 for the teacher's confidence",
          objective.cakld_beta);
  require(objective.temperature > 0, "objective.temperature", "a number > 0", objective.temperature);
  if (!objective.needs_teacher() && objective.ce == 0) {
    fail_option("objective", "a term with a weight above 0", "all 0");
  }
}

/// whole: whether it may be the whole run.
void validate_share(const char* name, double value, bool whole) {
  require(value >= 0 && (whole ? value <= 1 : value < 1), name,
          whole ? "a share of the steps in [0, 1]" : "a share of the steps in [0, 1)", value);
}

void validate_stages(const std::vector<Stage>& stages) {
  double before = 0;
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const std::string path = "progressive[" + std::to_string(i) + "].";
    if (const auto bad = grid::bad_name(stages[i].grid)) {
      fail_option(path + "grid", bad->expected, bad->got);
    }
    if (grid::find(stages[i].grid).info().is_float) {
      fail_option(path + "grid", "an integer grid", "\"" + stages[i].grid + "\"");
    }
    require(stages[i].until > before && stages[i].until < 1, (path + "until").c_str(),
            "a share of the steps below 1 and above that of the stage before", stages[i].until);
    before = stages[i].until;
  }
}

void validate_schedules(const Options& options) {
  require(options.ema >= 0 && options.ema < 1, "ema", "a decay in [0, 1)", options.ema);
  validate_share("delay", options.delay, false);
  validate_share("blend", options.blend, true);
  if (options.delay + options.blend > 1) {
    fail_option("blend", "delay and blend of at most 1 together", text(options.delay + options.blend));
  }
  validate_stages(options.progressive);
  if (options.unfreeze.from != "first" && options.unfreeze.from != "last") {
    fail_option("unfreeze.from", "first or last", "\"" + options.unfreeze.from + "\"");
  }
  validate_share("unfreeze.until", options.unfreeze.until, false);
  const Oscillation& oscillation = options.oscillation;
  require(oscillation.momentum > 0 && oscillation.momentum <= 1, "oscillation.momentum", "a number in (0, 1]",
          oscillation.momentum);
  require(oscillation.freeze_above >= 0 && oscillation.freeze_above < 1, "oscillation.freeze_above",
          "a frequency in [0, 1)", oscillation.freeze_above);
  require(oscillation.damping >= 0, "oscillation.damping", "a weight >= 0", oscillation.damping);
  validate_share("prox.until", options.prox.until, true);
  require(options.prox.steepness > 0, "prox.steepness", "a number > 0", options.prox.steepness);
  if (options.prox.until > 0 && (options.delay > 0 || options.blend > 0 || !options.progressive.empty())) {
    fail_option("prox", "no delay, blend or progressive beside it", "several");
  }
}

void validate_expressions(const std::vector<std::string>& frozen) {
  for (std::size_t i = 0; i < frozen.size(); ++i) {
    try {
      const std::regex compiled(frozen[i], std::regex::ECMAScript);
    } catch (const std::regex_error& error) {
      fail_option("frozen[" + std::to_string(i) + "]", "an ECMAScript expression",
                  "\"" + frozen[i] + "\" (" + error.what() + ")");
    }
  }
}

}  // namespace

void fail_option(const std::string& path, const std::string& expected, const std::string& got) {
  throw ArgumentError("options: " + path + ": expected " + expected + ", got " + got);
}

void validate(const Options& options) {
  at_least("steps", options.steps, 1);
  at_least("batch_size", options.batch_size, 1);
  at_least("sequence_length", options.sequence_length, 2);
  at_least("accumulate", options.accumulate, 1);
  at_least("loss_chunk", options.loss_chunk, 0);
  at_least("eval_every", options.eval_every, 0);
  at_least("save_every", options.save_every, 0);
  at_least("telemetry_every", options.telemetry_every, 0);
  require(options.learning_rate > 0, "learning_rate", "a number > 0", options.learning_rate);
  require(options.warmup >= 0 && options.warmup <= 1, "warmup", "a share in [0, 1]", options.warmup);
  require(options.final_learning_rate >= 0 && options.final_learning_rate <= 1, "final_learning_rate",
          "a share in [0, 1]", options.final_learning_rate);
  require(options.beta1 >= 0 && options.beta1 < 1, "beta1", "a number in [0, 1)", options.beta1);
  require(options.beta2 >= 0 && options.beta2 < 1, "beta2", "a number in [0, 1)", options.beta2);
  require(options.epsilon > 0, "epsilon", "a number > 0", options.epsilon);
  require(options.weight_decay >= 0, "weight_decay", "a number >= 0", options.weight_decay);
  require(options.clip_norm >= 0, "clip_norm", "a number >= 0", options.clip_norm);
  require(options.scale_learning_rate >= 0, "scale_learning_rate", "a number >= 0",
          options.scale_learning_rate);
  validate_objective(options.objective);
  validate_schedules(options);
  const std::string& dtype = options.compute_dtype;
  if (dtype != "auto" && dtype != "float32" && dtype != "bfloat16") {
    fail_option("compute_dtype", "one of auto, float32, bfloat16", "\"" + dtype + "\"");
  }
  validate_expressions(options.frozen);
}

double learning_rate_at(const Options& options, int64_t step) noexcept {
  const auto warmup = static_cast<int64_t>(std::llround(options.warmup * static_cast<double>(options.steps)));
  if (step <= warmup) return options.learning_rate * static_cast<double>(step) / static_cast<double>(warmup);
  constexpr double kPi = 3.14159265358979323846;
  const double progress = static_cast<double>(step - warmup) / static_cast<double>(options.steps - warmup);
  const double share = options.final_learning_rate;
  return options.learning_rate * (share + (1 - share) * 0.5 * (1 + std::cos(kPi * progress)));
}

}  // namespace qat::train
