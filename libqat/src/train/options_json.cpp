#include <concepts>
#include <limits>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "qat/train/options.hpp"
#include "train/options_check.hpp"

namespace qat::train {
namespace {

using Json = nlohmann::ordered_json;

/// Calls visit(name, member) for every option of the top level.
template <typename AnyOptions, typename Visit>
void for_each_option(AnyOptions& options, Visit&& visit) {
  visit("steps", options.steps);
  visit("batch_size", options.batch_size);
  visit("sequence_length", options.sequence_length);
  visit("accumulate", options.accumulate);
  visit("learning_rate", options.learning_rate);
  visit("scale_learning_rate", options.scale_learning_rate);
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
  visit("ema", options.ema);
  visit("delay", options.delay);
  visit("blend", options.blend);
  visit("progressive", options.progressive);
  visit("unfreeze", options.unfreeze);
  visit("oscillation", options.oscillation);
  visit("prox", options.prox);
  visit("seed", options.seed);
  visit("eval_every", options.eval_every);
  visit("save_every", options.save_every);
  visit("telemetry_every", options.telemetry_every);
}

// for_each_member calls visit(name, member) for the members of an option that is an object.

template <typename Visit>
void for_each_member(auto& objective, Visit&& visit)
  requires std::same_as<std::remove_cvref_t<decltype(objective)>, Objective>
{
  visit("kl", objective.kl);
  visit("ce", objective.ce);
  visit("temperature", objective.temperature);
  visit("reverse_kl", objective.reverse_kl);
  visit("jsd", objective.jsd);
  visit("jsd_alpha", objective.jsd_alpha);
  visit("cakld", objective.cakld);
  visit("cakld_beta", objective.cakld_beta);
}

template <typename Visit>
void for_each_member(auto& stage, Visit&& visit)
  requires std::same_as<std::remove_cvref_t<decltype(stage)>, Stage>
{
  visit("grid", stage.grid);
  visit("until", stage.until);
}

template <typename Visit>
void for_each_member(auto& unfreeze, Visit&& visit)
  requires std::same_as<std::remove_cvref_t<decltype(unfreeze)>, Unfreeze>
{
  visit("from", unfreeze.from);
  visit("until", unfreeze.until);
}

template <typename Visit>
void for_each_member(auto& oscillation, Visit&& visit)
  requires std::same_as<std::remove_cvref_t<decltype(oscillation)>, Oscillation>
{
  visit("momentum", oscillation.momentum);
  visit("freeze_above", oscillation.freeze_above);
  visit("damping", oscillation.damping);
}

template <typename Visit>
void for_each_member(auto& prox, Visit&& visit)
  requires std::same_as<std::remove_cvref_t<decltype(prox)>, Prox>
{
  visit("until", prox.until);
  visit("steepness", prox.steepness);
}

/// An option that is an object.
template <typename Value>
concept Group = requires(Value& value) { for_each_member(value, [](const char*, auto&) {}); };

template <typename Value>
void write(Json& json, const Value& value) {
  json = value;
}

template <Group Value>
void write(Json& json, const Value& value) {
  json = Json::object();
  for_each_member(value, [&](const char* name, const auto& member) { write(json[name], member); });
}

template <Group Value>
void write(Json& json, const std::vector<Value>& values) {
  json = Json::array();
  for (const Value& value : values) write(json.emplace_back(), value);
}

void read(const Json& json, const std::string& path, int64_t& value) {
  const bool fits =
      json.is_number_integer() &&
      (!json.is_number_unsigned() ||
       json.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<int64_t>::max()));
  if (!fits) fail_option(path, "an integer", json.dump());
  value = json.get<int64_t>();
}

void read(const Json& json, const std::string& path, double& value) {
  if (!json.is_number()) fail_option(path, "a number", json.dump());
  value = json.get<double>();
}

void read(const Json& json, const std::string& path, std::string& value) {
  if (!json.is_string()) fail_option(path, "a string", json.dump());
  value = json.get<std::string>();
}

void read(const Json& json, const std::string& path, std::vector<std::string>& value) {
  if (!json.is_array()) fail_option(path, "a list of strings", json.dump());
  value.assign(json.size(), "");
  for (std::size_t i = 0; i < json.size(); ++i) read(json[i], path + "[" + std::to_string(i) + "]", value[i]);
}

template <Group Value>
void read(const Json& json, const std::string& path, Value& value);
template <Group Value>
void read(const Json& json, const std::string& path, std::vector<Value>& values);

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
    if (!legal) fail_option(prefix + key, "one of " + known, "an unknown key");
  }
}

template <Group Value>
void read(const Json& json, const std::string& path, Value& value) {
  if (!json.is_object()) fail_option(path, "an object", json.dump());
  read_object(json, path + ".", [&](auto&& visit) { for_each_member(value, visit); });
}

template <Group Value>
void read(const Json& json, const std::string& path, std::vector<Value>& values) {
  if (!json.is_array()) fail_option(path, "a list of objects", json.dump());
  values.assign(json.size(), {});
  for (std::size_t i = 0; i < json.size(); ++i) {
    read(json[i], path + "[" + std::to_string(i) + "]", values[i]);
  }
}

}  // namespace

std::string to_json(const Options& options) {
  Json json;
  for_each_option(options, [&](const char* name, const auto& value) { write(json[name], value); });
  return json.dump();
}

Options options_from_json(std::string_view json) {
  const Json parsed = Json::parse(json, nullptr, false);
  if (!parsed.is_object()) fail_option("$", "a JSON object", std::string(json.substr(0, 60)));
  Options options;
  read_object(parsed, "", [&](auto&& visit) { for_each_option(options, visit); });
  validate(options);
  return options;
}

}  // namespace qat::train
