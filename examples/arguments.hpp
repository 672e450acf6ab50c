#pragma once

// The command line of an example.

#include <charconv>
#include <map>
#include <set>
#include <string>

#include "qat/core/error.hpp"

/// Flags and their values as they were given.
class Arguments {
 public:
  /// with_value: flags that take one; the others are --resume and --help. program: named in messages.
  Arguments(int count, char** values, const std::string& program, const std::set<std::string>& with_value)
      : program_(program) {
    for (int i = 1; i < count; ++i) {
      const std::string flag = values[i];
      if (flag == "--resume" || flag == "--help") {
        given_[flag] = "";
      } else if (!with_value.contains(flag)) {
        throw qat::ArgumentError(program_ + ": " + flag + ": expected a flag that --help lists");
      } else if (++i == count) {
        throw qat::ArgumentError(program_ + ": " + flag + ": expected a value, got none");
      } else {
        given_[flag] = values[i];
      }
    }
  }

  bool has(const std::string& flag) const { return given_.contains(flag); }

  std::string required(const std::string& flag) const {
    if (!has(flag)) throw qat::ArgumentError(program_ + ": " + flag + ": expected a value, see --help");
    return given_.at(flag);
  }
  std::string text(const std::string& flag, const std::string& otherwise) const {
    return has(flag) ? given_.at(flag) : otherwise;
  }
  template <typename Number>
  void read(const std::string& flag, Number& value) const {
    if (!has(flag)) return;
    const std::string& given = given_.at(flag);
    const auto [end, error] = std::from_chars(given.data(), given.data() + given.size(), value);
    if (error != std::errc() || end != given.data() + given.size()) {
      throw qat::ArgumentError(program_ + ": " + flag + ": expected a number, got \"" + given + "\"");
    }
  }

 private:
  std::string program_;
  std::map<std::string, std::string> given_;
};
