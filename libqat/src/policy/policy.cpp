#include "qat/policy/policy.hpp"

#include <fstream>
#include <regex>
#include <sstream>

#include "presets.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/seq.hpp"

namespace qat {
namespace {

// std::regex recurses once per character it matches: longer names could exhaust the stack.
constexpr size_t kMaxNameLength = 1024;
// A policy is a page of text; whatever is larger is another file.
constexpr std::streamsize kMaxFileBytes = 1 << 20;

std::string matched_name(const std::string& name) {
  constexpr std::string_view kSuffix = ".weight";
  if (name.size() > kMaxNameLength) {
    throw ArgumentError("policy: " + name.substr(0, 64) + "...: expected a name of at most " +
                        std::to_string(kMaxNameLength) + " characters, got " + std::to_string(name.size()));
  }
  return name.ends_with(kSuffix) ? name.substr(0, name.size() - kSuffix.size()) : name;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

/// Weights in a row of `shape`. ArgumentError when there is no row, or no number for it.
int64_t row_width(const Target& target) {
  int64_t width = target.shape.size() < 2 ? 0 : 1;
  for (size_t i = 0; i < target.shape.size(); ++i) {
    const bool legal = target.shape[i] > 0;
    if (!legal || (i > 0 && __builtin_mul_overflow(width, target.shape[i], &width))) width = 0;
    if (width == 0) break;
  }
  if (width == 0) {
    throw ArgumentError("policy: " + target.name +
                        ": expected a weight of 2 or more dimensions, all of them positive, got shape " +
                        shape_text(target.shape));
  }
  return width;
}

void check_width(const Target& target, const Scheme& scheme) {
  const grid::Grid& found = grid::find(scheme.weight);
  if (found.info().is_float) return;
  const int64_t width = row_width(target);
  if (found.divides(width)) return;
  throw ArgumentError("policy: " + target.name + ": expected a width that is a multiple of " +
                      std::to_string(found.block(width)) + " (the block of " + scheme.weight + "), got " +
                      std::to_string(width) + " (shape " + shape_text(target.shape) + ")");
}

void check_estimator(const Target& target, const Scheme& scheme, const Estimator& estimator) {
  const grid::Grid& found = grid::find(scheme.weight);
  if (estimator.scale == ScaleRule::kSeq && !found.info().is_float && !grid::holds_seq(found)) {
    throw ArgumentError("policy: " + target.name + ": expected a grid that holds the levels of seq (" +
                        grid::seq_names() + "), or a rule with an estimator of its own, got " +
                        scheme.weight);
  }
  if (estimator.scale != ScaleRule::kDifferentiated) return;
  if (found.rule_has_gradient()) return;
  throw ArgumentError("policy: " + target.name +
                      ": expected a grid whose scale rule has a gradient for the " +
                      "scale rule differentiated, got " + scheme.weight);
}

/// "3 tensors (a, b, c)"; the first few names are enough to see what a rule should have matched.
std::string listing(const std::vector<Target>& targets) {
  constexpr size_t kShown = 3;
  std::string text = std::to_string(targets.size()) + (targets.size() == 1 ? " tensor" : " tensors");
  for (size_t i = 0; i < targets.size() && i < kShown; ++i) text += (i == 0 ? " (" : ", ") + targets[i].name;
  if (targets.size() > kShown) text += ", ...";
  return targets.empty() ? text : text + ")";
}

/// A rule with its expression compiled, and what became of it.
struct Matcher {
  const Rule* rule;
  std::regex expression;
  std::string path;                   // "rules[2]", for messages
  bool won = false;                   // first to match some tensor
  const Matcher* loser_to = nullptr;  // an earlier rule that took a tensor which this one matches too

  bool matches(const std::string& name, SlotKind kind) const {
    if (rule->kind && *rule->kind != kind) return false;
    try {
      return std::regex_match(name, expression);
    } catch (const std::regex_error& error) {
      throw ArgumentError("policy: " + path + ".match: expected an expression that can be matched, got \"" +
                          rule->match + "\" (" + error.what() + ")");
    }
  }
};

std::vector<Matcher> compiled(const std::vector<Rule>& rules) {
  std::vector<Matcher> matchers;
  for (const Rule& rule : rules) {
    const std::string path = "rules[" + std::to_string(matchers.size()) + "]";
    matchers.push_back({&rule, std::regex(rule.match, std::regex::ECMAScript), path});
  }
  return matchers;
}

const Rule* rule_of(const Target& target, std::vector<Matcher>& matchers) {
  const std::string name = matched_name(target.name);
  Matcher* winner = nullptr;
  for (Matcher& matcher : matchers) {
    if (!matcher.matches(name, target.kind)) continue;
    if (winner == nullptr) {
      winner = &matcher;
      matcher.won = true;
    } else {
      matcher.loser_to = winner;
    }
  }
  if (winner == nullptr) return nullptr;
  check_width(target, winner->rule->scheme);
  return winner->rule;
}

void check_used(const std::vector<Matcher>& matchers, const std::vector<Target>& targets) {
  for (const Matcher& matcher : matchers) {
    if (matcher.won || matcher.rule->optional) continue;
    const std::string subject = "policy: " + matcher.path + ".match: ";
    const std::string got = "\"" + matcher.rule->match + "\", ";
    if (matcher.loser_to != nullptr) {
      throw ArgumentError(subject + "expected a tensor that no earlier rule matches, got " + got +
                          "whose tensors all go to earlier rules (such as " + matcher.loser_to->path + ")");
    }
    throw ArgumentError(subject + "expected to match a tensor, or \"optional\": true, got " + got +
                        "which matches none of " + listing(targets));
  }
}

const policy::Preset& find_preset(std::string_view name) {
  std::string legal;
  for (const policy::Preset& preset : policy::all_presets()) {
    if (preset.name == name) return preset;
    legal += (legal.empty() ? "" : ", ") + std::string(preset.name);
  }
  throw ArgumentError("policy: preset: expected one of " + legal + ", got \"" + std::string(name) + "\"");
}

}  // namespace

Policy Policy::from_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<size_t>(kMaxFileBytes) + 1, '\0');
  file.read(text.data(), kMaxFileBytes + 1);
  // A whole small file ends the stream; a directory or a missing file reads nothing and fails otherwise.
  if (!file.eof() || file.bad()) {
    const bool large = file.gcount() > kMaxFileBytes;
    throw FileError(
        "policy: " + path + ": expected a readable policy file" +
        (large ? ", got more than " + std::to_string(kMaxFileBytes) + " bytes" : std::string(", got none")));
  }
  text.resize(static_cast<size_t>(file.gcount()));
  return parse(text, path, "policy: " + path + ": ");
}

Policy Policy::preset(std::string_view name) {
  return parse(find_preset(name).json, std::string(name), "policy: ");
}

std::string_view Policy::preset_summary(std::string_view name) {
  return find_preset(name).summary;
}

Policy Policy::load(const std::string& name_or_path) {
  const bool is_path = name_or_path.find('/') != std::string::npos || name_or_path.ends_with(".json");
  return is_path ? from_file(name_or_path) : preset(name_or_path);
}

std::vector<std::string_view> Policy::presets() {
  std::vector<std::string_view> names;
  for (const policy::Preset& preset : policy::all_presets()) names.push_back(preset.name);
  return names;
}

std::vector<const Rule*> Policy::matches(const std::vector<Target>& targets) const {
  std::vector<Matcher> matchers = compiled(rules_);
  std::vector<const Rule*> rules;
  rules.reserve(targets.size());
  for (const Target& target : targets) rules.push_back(rule_of(target, matchers));
  check_used(matchers, targets);
  return rules;
}

std::vector<Scheme> Policy::resolve(const std::vector<Target>& targets) const {
  std::vector<Scheme> schemes;
  for (const Rule* rule : matches(targets)) schemes.push_back(rule != nullptr ? rule->scheme : Scheme{});
  return schemes;
}

std::vector<Activations> Policy::activations(const std::vector<Target>& targets) const {
  std::vector<Activations> formats;
  for (const Rule* rule : matches(targets)) {
    formats.push_back(rule != nullptr ? rule->activations : Activations{});
  }
  return formats;
}

std::vector<Estimator> Policy::estimators(const std::vector<Target>& targets) const {
  std::vector<Estimator> estimators;
  const std::vector<const Rule*> rules = matches(targets);
  for (size_t i = 0; i < targets.size(); ++i) {
    const Rule* rule = rules[i];
    estimators.push_back(rule != nullptr && rule->estimator ? *rule->estimator : estimator_);
    if (rule != nullptr) check_estimator(targets[i], rule->scheme, estimators.back());
  }
  return estimators;
}

}  // namespace qat
