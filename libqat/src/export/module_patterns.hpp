#pragma once

// Modules in configurations: by name, or by one regular expression for the same module of every layer.

#include <map>
#include <regex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace qat {

/// Either a module's name, or a regular expression that means exactly the modules it was made for.
struct ModulePattern {
  std::string text;
  bool regex = false;  ///< numbers of layers are `\d+`, and it wants a whole name
};

/// Patterns for `members`, sorted: a regular expression where it matches several of them and none of
/// `others`.
std::vector<ModulePattern> module_patterns(const std::vector<std::string>& members,
                                           const std::vector<std::string>& others);

/// The name with what regular expressions take for operators escaped.
std::string escaped(std::string_view name);

/// How much of the name a regular expression must match: as Python's re.search and re.match.
enum class MatchFrom { kAnywhere, kStart };

/// Matches names with regular expressions of a configuration, each of which it compiles once.
class NameMatcher {
 public:
  explicit NameMatcher(MatchFrom from) : from_(from) {}

  /// Whether the expression (ECMAScript's, which covers what configurations use of Python's) matches, in time
  /// polynomial in both. UnsupportedError for one that is malformed, too long, or counts repetitions.
  bool matches(const std::string& expression, const std::string& name);

 private:
  MatchFrom from_;
  std::map<std::string, std::regex> compiled_;
};

}  // namespace qat
