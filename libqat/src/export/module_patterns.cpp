#include "export/module_patterns.hpp"

#include <algorithm>
#include <map>
#include <set>

#include "qat/core/error.hpp"

namespace qat {
namespace {

constexpr std::size_t kLongest = 512;

bool is_number(std::string_view text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
}

/// "model.layers.3.mlp" -> "model\.layers\.\d+\.mlp".
std::string generalized(std::string_view name) {
  std::string pattern;
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('.', begin), name.size());
    const std::string_view part = name.substr(begin, end - begin);
    pattern += (begin == 0 ? "" : "\\.") + (is_number(part) ? std::string("\\d+") : escaped(part));
    begin = end + 1;
  }
  return pattern;
}

constexpr auto flags() {
#ifdef __GLIBCXX__
  return std::regex::ECMAScript | std::regex_constants::__polynomial;
#else
  return std::regex::ECMAScript;
#endif
}

}  // namespace

std::string escaped(std::string_view name) {
  std::string text;
  for (const char c : name) {
    if (std::string_view("\\^$.|?*+()[]{}").find(c) != std::string_view::npos) text += '\\';
    text += c;
  }
  return text;
}

std::vector<ModulePattern> module_patterns(const std::vector<std::string>& members,
                                           const std::vector<std::string>& others) {
  std::map<std::string, std::vector<std::string>> alike;
  for (const std::string& name : members) alike[generalized(name)].push_back(name);
  std::set<std::string> taken;
  for (const std::string& name : others) taken.insert(generalized(name));
  std::vector<ModulePattern> patterns;
  for (auto& [pattern, names] : alike) {
    if (names.size() > 1 && !taken.contains(pattern)) {
      patterns.push_back({pattern, true});
      continue;
    }
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) patterns.push_back({name, false});
  }
  return patterns;
}

bool NameMatcher::matches(const std::string& expression, const std::string& name) {
  const bool simple =
      expression.size() <= kLongest && name.size() <= kLongest && expression.find('{') == std::string::npos;
  try {
    if (simple) {
      auto found = compiled_.find(expression);
      if (found == compiled_.end())
        found = compiled_.emplace(expression, std::regex(expression, flags())).first;
      const auto where = from_ == MatchFrom::kStart ? std::regex_constants::match_continuous
                                                    : std::regex_constants::match_default;
      return std::regex_search(name, found->second, where);
    }
  } catch (const std::regex_error&) {
  }
  throw UnsupportedError("import_checkpoint: expected simple regular expressions of at most " +
                         std::to_string(kLongest) + " characters, got " + expression.substr(0, kLongest));
}

}  // namespace qat
