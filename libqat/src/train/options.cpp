#include "qat/train/options.hpp"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>

#include "qat/core/error.hpp"

namespace qat::train {
namespace {

using Json = nlohmann::ordered_json;

[[noreturn]] void fail(const std::string& path, const std::string& expected, const std::string& got) {
  throw ArgumentError("options: " + path + ": expected " + expected + ", got " + got);
}

/// Calls visit(name, member) for every option of the top level.
template <typename AnyOptions, typename Visit>
void for_each_option(AnyOptions& options, Visit&& visit) {
  visit("steps", options.steps);
  visit("batch_size", options.batch_size);
  visit("sequence_length", options.sequence_length);
  visit("accumulate", options.accumulate);
  visit("learning_rate", options.learning_rate);
  visit("warmup", options.warmup);
  visit("final_learning_rate", options.final_learning_rate);
  visit("beta1", options.beta1);
  visit("beta2", options.beta2);
  visit("epsilon", options.epsilon);
  visit("weight_decay", options.weight_decay);
  visit("clip_norm", options.clip_norm);
  visit("objective", options.objective);
  visit("loss_chunk", options.loss_chunk);
  visit("compute_dtype", options.compute_dtype);
  visit("frozen", options.frozen);
  visit("seed", options.seed);
  visit("eval_every", options.eval_every);
  visit("save_every", options.save_every);
  visit("telemetry_every", options.telemetry_every);
}

template <typename AnyObjective, typename Visit>
void for_each_term(AnyObjective& objective, Visit&& visit) {
  visit("kl", objective.kl);
  visit("ce", objective.ce);
  visit("temperature", objective.temperature);
}

void write(Json& json, const Objective& objective) {
  json = Json::object();
  for_each_term(objective, [&](const char* name, double value) { json[name] = value; });
}

template <typename Value>
void write(Json& json, const Value& value) {
  json = value;
}

void read(const Json& json, const std::string& path, int64_t& value) {
  const bool fits =
      json.is_number_integer() &&
      (!json.is_number_unsigned() ||
       json.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<int64_t>::max()));
  if (!fits) fail(path, "an integer", json.dump());
  value = json.get<int64_t>();
}

void read(const Json& json, const std::string& path, double& value) {
  if (!json.is_number()) fail(path, "a number", json.dump());
  value = json.get<double>();
}

void read(const Json& json, const std::string& path, std::string& value) {
  if (!json.is_string()) fail(path, "a string", json.dump());
  value = json.get<std::string>();
}

void read(const Json& json, const std::string& path, std::vector<std::string>& value) {
  if (!json.is_array()) fail(path, "a list of strings", json.dump());
  value.assign(json.size(), "");
  for (std::size_t i = 0; i < json.size(); ++i) read(json[i], path + "[" + std::to_string(i) + "]", value[i]);
}

void read(const Json& json, const std::string& path, Objective& objective);

/// Fills the members that `json` has; `each` enumerates (name, member). Unknown keys are errors.
template <typename Each>
void read_object(const Json& json, const std::string& prefix, Each&& each) {
  std::string known;
  std::size_t found = 0;
  each([&](const std::string& name, auto& member) {
    known += (known.empty() ? "" : ", ") + name;
    if (const auto entry = json.find(name); entry != json.end()) {
      read(*entry, prefix + name, member);
      ++found;
    }
  });
  if (found == json.size()) return;
  for (const auto& [key, unused] : json.items()) {
    bool legal = false;
    each([&](const std::string& name, auto&) { legal = legal || name == key; });
    if (!legal) fail(prefix + key, "one of " + known, "an unknown key");
  }
}

void read(const Json& json, const std::string& path, Objective& objective) {
  if (!json.is_object()) fail(path, "an object", json.dump());
  read_object(json, path + ".", [&](auto&& visit) { for_each_term(objective, visit); });
}

std::string text(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

void at_least(const char* name, int64_t value, int64_t least) {
  if (value < least) fail(name, "at least " + std::to_string(least), std::to_string(value));
}

/// Also refuses NaN, for which every comparison is false.
void require(bool ok, const char* name, const char* range, double value) {
  if (!ok || !std::isfinite(value)) fail(name, range, text(value));
}

void validate_objective(const Objective& objective) {
  require(objective.kl >= 0, "objective.kl", "a weight >= 0", objective.kl);
  require(objective.ce >= 0, "objective.ce", "a weight >= 0", objective.ce);
  require(objective.temperature > 0, "objective.temperature", "a number > 0", objective.temperature);
  if (objective.kl == 0 && objective.ce == 0) fail("objective", "kl or ce above 0", "both 0");
}

void validate_expressions(const std::vector<std::string>& frozen) {
  for (std::size_t i = 0; i < frozen.size(); ++i) {
    try {
      const std::regex compiled(frozen[i], std::regex::ECMAScript);
    } catch (const std::regex_error& error) {
      fail("frozen[" + std::to_string(i) + "]", "an ECMAScript expression",
           "\"" + frozen[i] + "\" (" + error.what() + ")");
    }
  }
}

}  // namespace

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
  validate_objective(options.objective);
  const std::string& dtype = options.compute_dtype;
  if (dtype != "auto" && dtype != "float32" && dtype != "bfloat16") {
    fail("compute_dtype", "one of auto, float32, bfloat16", "\"" + dtype + "\"");
  }
  validate_expressions(options.frozen);
}

std::string to_json(const Options& options) {
  Json json;
  for_each_option(options, [&](const char* name, const auto& value) { write(json[name], value); });
  return json.dump();
}

Options options_from_json(std::string_view json) {
  const Json parsed = Json::parse(json, nullptr, false);
  if (!parsed.is_object()) fail("$", "a JSON object", std::string(json.substr(0, 60)));
  Options options;
  read_object(parsed, "", [&](auto&& visit) { for_each_option(options, visit); });
  validate(options);
  return options;
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
