// Policy <-> JSON. Reading names the JSON path of whatever is wrong; writing is canonical.

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <span>
#include <utility>

#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/policy/policy.hpp"

namespace qat {
namespace {

using Json = nlohmann::json;

// std::regex recurses while it compiles, so an expression's length bounds the stack it can take.
constexpr size_t kMaxMatchLength = 4096;
constexpr uint64_t kMaxBatches = 1000000000;

constexpr std::array kEstimatorKinds{EstimatorKind::kSte, EstimatorKind::kClippedSte,
                                     EstimatorKind::kTrustMask, EstimatorKind::kStableQat};
constexpr std::array kScaleRules{ScaleRule::kReference, ScaleRule::kSearch, ScaleRule::kDifferentiated,
                                 ScaleRule::kLearned, ScaleRule::kSeq};
constexpr std::array kScaleGradients{ScaleGradient::kLsq, ScaleGradient::kTensor, ScaleGradient::kPlain};
/// Kinds that are short for clipped_ste with one of the rules of learned scales.
struct Short {
  std::string_view kind;
  ScaleRule scale;
};
constexpr std::array kShorts{Short{"lsq", ScaleRule::kLearned}, Short{"seq", ScaleRule::kSeq}};
constexpr std::array kSlotKinds{SlotKind::kLinear, SlotKind::kEmbedding, SlotKind::kConv, SlotKind::kOther};

/// A value of the document together with its path ("rules[2].weight"), for messages.
struct Node {
  const Json& json;
  std::string where;  // "policy: " or "policy: FILE: "
  std::string path;   // "" for the root

  Node at(const std::string& key) const {
    return {json.at(key), where, path.empty() ? key : path + "." + key};
  }
  Node at(size_t index) const { return {json.at(index), where, path + "[" + std::to_string(index) + "]"}; }
  bool has(const char* key) const { return json.contains(key); }

  [[noreturn]] void fail(const std::string& expected, const std::string& got) const {
    const std::string subject = path.empty() ? where : where + path + ": ";
    throw ArgumentError(subject + "expected " + expected + ", got " + got);
  }
};

std::string joined(const std::vector<std::string_view>& names) {
  std::string text;
  for (std::string_view name : names) {
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}

std::string in_quotes(std::string_view text) {
  return std::string("\"").append(text).append("\"");
}

void expect_object(const Node& node, const std::vector<std::string_view>& keys) {
  if (!node.json.is_object()) node.fail("an object", node.json.type_name());
  for (const auto& [key, value] : node.json.items()) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      node.fail("only the keys " + joined(keys), "unknown key " + in_quotes(key));
    }
  }
}

Node required(const Node& node, const char* key) {
  if (!node.has(key)) node.fail("the key " + in_quotes(key), "none");
  return node.at(key);
}

std::string string_of(const Node& node) {
  if (!node.json.is_string()) node.fail("a string", node.json.type_name());
  return node.json.get<std::string>();
}

std::string one_of(const Node& node, const std::vector<std::string_view>& names) {
  std::string name = string_of(node);
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    node.fail("one of " + joined(names), in_quotes(name));
  }
  return name;
}

/// One of the values that the option `key` of a grid may have; "" when the rule does not say it.
std::string option_of(const Node& rule, const char* key, const std::string& grid,
                      std::span<const std::string_view> legal) {
  if (!rule.has(key)) return "";
  const Node node = rule.at(key);
  if (grid.find_first_of("@:") != std::string::npos) {
    node.fail("options in keys or in the grid's name", "both, with " + in_quotes(grid));
  }
  if (legal.empty()) node.fail("no such key for " + grid, node.json.dump());
  return one_of(node, {legal.begin(), legal.end()});
}

/// The grid's whole name, from its plain name and the keys of its options.
std::string grid_of(const Node& rule) {
  const Node weight = required(rule, "weight");
  const std::string base = string_of(weight);
  if (const auto bad = grid::bad_name(base)) weight.fail(bad->expected, bad->got);
  const grid::NameOptions options = grid::name_options(base);
  const std::string scale_grid = option_of(rule, "scale_grid", base, options.scale_grids);
  const std::string dequant_dtype = option_of(rule, "dequant_dtype", base, options.dequant_dtypes);
  return std::string(grid::find(grid::with_options(base, scale_grid, dequant_dtype)).info().name);
}

template <class Kinds>
std::vector<std::string_view> spellings(const Kinds& kinds) {
  std::vector<std::string_view> names;
  for (auto kind : kinds) names.push_back(to_string(kind));
  return names;
}

std::string expression_of(const Node& node) {
  std::string match = string_of(node);
  if (match.size() > kMaxMatchLength) {
    node.fail("at most " + std::to_string(kMaxMatchLength) + " characters", std::to_string(match.size()));
  }
  try {
    std::regex compiled(match, std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    node.fail("an ECMAScript regular expression", in_quotes(match) + " (" + error.what() + ")");
  }
  return match;
}

Estimator estimator_of(const Node& node) {
  expect_object(node, {"kind", "scale", "scale_gradient"});
  std::vector<std::string_view> kinds = spellings(kEstimatorKinds);
  for (const Short& one : kShorts) kinds.push_back(one.kind);
  const std::string kind = one_of(required(node, "kind"), kinds);
  Estimator estimator;
  if (node.has("scale")) estimator.scale = scale_rule(one_of(node.at("scale"), spellings(kScaleRules)));
  if (node.has("scale_gradient")) {
    estimator.scale_gradient = scale_gradient(one_of(node.at("scale_gradient"), spellings(kScaleGradients)));
  }
  const auto* const found =
      std::find_if(kShorts.begin(), kShorts.end(), [&](const Short& one) { return one.kind == kind; });
  if (found == kShorts.end()) {
    estimator.kind = estimator_kind(kind);
    return estimator;
  }
  if (node.has("scale") && estimator.scale != found->scale) {
    node.at("scale").fail(in_quotes(to_string(found->scale)) + " for the kind " + kind + ", or no such key",
                          in_quotes(to_string(estimator.scale)));
  }
  estimator.kind = EstimatorKind::kClippedSte;
  estimator.scale = found->scale;
  return estimator;
}

/// The format under `key`, one of `legal`; "" when there is none.
std::string activation_of(const Node& node, const char* key, const std::vector<std::string_view>& legal) {
  return node.has(key) ? one_of(node.at(key), legal) : "";
}

ActivationScales activation_scales_of(const Node& node) {
  expect_object(node, {"rule", "batches"});
  ActivationScales scales;
  if (node.has("rule")) {
    scales.rule = activation_rule(
        one_of(node.at("rule"), {to_string(ActivationRule::kObserved), to_string(ActivationRule::kLearned)}));
  }
  if (node.has("batches")) {
    const Node batches = node.at("batches");
    const bool legal = batches.json.is_number_unsigned() && batches.json.get<uint64_t>() <= kMaxBatches;
    if (!legal) batches.fail("a whole number from 0 to " + std::to_string(kMaxBatches), batches.json.dump());
    scales.batches = batches.json.get<int64_t>();
  }
  return scales;
}

Rule rule_of(const Node& node) {
  expect_object(node, {"match", "kind", "weight", "scale_grid", "dequant_dtype", "input", "output",
                       "optional", "estimator"});
  Rule rule;
  rule.match = expression_of(required(node, "match"));
  if (node.has("kind")) rule.kind = slot_kind(one_of(node.at("kind"), spellings(kSlotKinds)));
  rule.scheme.weight = grid_of(node);
  rule.activations.input = activation_of(node, "input", activation_formats());
  rule.activations.output = activation_of(node, "output", {kInt8TensorStatic});
  for (const char* key : {"input", "output"}) {
    if (node.has(key) && grid::find(rule.scheme.weight).info().is_float) {
      node.at(key).fail("no such key for the float grid " + rule.scheme.weight, node.at(key).json.dump());
    }
  }
  if (node.has("optional")) {
    const Node optional = node.at("optional");
    if (!optional.json.is_boolean()) optional.fail("true or false", optional.json.type_name());
    rule.optional = optional.json.get<bool>();
  }
  if (node.has("estimator")) rule.estimator = estimator_of(node.at("estimator"));
  return rule;
}

/// What differs from the defaults, and the kind.
Json json_of(const Estimator& estimator) {
  const Estimator defaults;
  Json json = {{"kind", to_string(estimator.kind)}};
  if (estimator.scale != defaults.scale) json["scale"] = to_string(estimator.scale);
  if (estimator.scale_gradient != defaults.scale_gradient) {
    json["scale_gradient"] = to_string(estimator.scale_gradient);
  }
  return json;
}

/// The parser's message without its error number, and in ASCII: it quotes the bytes it could not read.
std::string readable(const std::string& message) {
  const size_t end = message.find("] ");
  std::string text = end == std::string::npos ? message : message.substr(end + 2);
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e) c = '?';
  }
  return text;
}

/// JSON in which no object has the same key twice: the parser alone would silently keep the last.
Json document_of(std::string_view text, const std::string& where) {
  std::vector<std::set<std::string>> open;
  const auto check = [&](int, Json::parse_event_t event, Json& value) {
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key && !open.back().insert(value.get<std::string>()).second) {
      throw ArgumentError(where + "expected each key once, got " + in_quotes(value.get<std::string>()) +
                          " twice in one object");
    }
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::exception& error) {
    throw ArgumentError(where + "expected JSON, got a " + readable(error.what()));
  }
}

}  // namespace

Policy Policy::parse(std::string_view json, std::string name, const std::string& where) {
  const Json document = document_of(json, where);
  const Node root{document, where, ""};
  expect_object(root, {"rules", "estimator", "kv_cache", "activation_scales"});
  Policy policy;
  policy.name_ = std::move(name);
  const Node rules = required(root, "rules");
  if (!rules.json.is_array()) rules.fail("an array", rules.json.type_name());
  for (size_t i = 0; i < rules.json.size(); ++i) policy.rules_.push_back(rule_of(rules.at(i)));
  if (root.has("estimator")) policy.estimator_ = estimator_of(root.at("estimator"));
  policy.kv_cache_ = activation_of(root, "kv_cache", {kInt8TensorStatic});
  if (root.has("activation_scales")) {
    policy.activation_scales_ = activation_scales_of(root.at("activation_scales"));
  }
  return policy;
}

Policy Policy::from_json(std::string_view json) {
  return parse(json, "", "policy: ");
}

Policy Policy::with_scale(ScaleRule scale) const {
  Policy policy = *this;
  policy.estimator_.scale = scale;
  for (Rule& rule : policy.rules_) {
    if (rule.estimator) rule.estimator->scale = scale;
  }
  return policy;
}

Policy Policy::with_estimator(const Estimator& estimator) const {
  Policy policy = *this;
  policy.estimator_ = estimator;
  for (Rule& rule : policy.rules_) rule.estimator.reset();
  return policy;
}

std::string Policy::to_json() const {
  Json document = {{"rules", Json::array()}};
  for (const Rule& rule : rules_) {
    Json entry = {{"match", rule.match}, {"weight", rule.scheme.weight}};
    if (rule.kind) entry["kind"] = to_string(*rule.kind);
    if (!rule.activations.input.empty()) entry["input"] = rule.activations.input;
    if (!rule.activations.output.empty()) entry["output"] = rule.activations.output;
    if (rule.optional) entry["optional"] = true;
    if (rule.estimator) entry["estimator"] = json_of(*rule.estimator);
    document["rules"].push_back(std::move(entry));
  }
  if (estimator_ != Estimator{}) document["estimator"] = json_of(estimator_);
  if (!kv_cache_.empty()) document["kv_cache"] = kv_cache_;
  if (activation_scales_ != ActivationScales{}) {
    document["activation_scales"] = {{"rule", to_string(activation_scales_.rule)},
                                     {"batches", activation_scales_.batches}};
  }
  return document.dump();
}

}  // namespace qat
