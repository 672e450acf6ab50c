#pragma once

// Messages about the values of a configuration. Callers put "function: file: " before them.

#include <string>
#include <string_view>

#include "qat/arch/rope.hpp"

namespace qat::arch {

inline bool is_there(const ConfigValue& value) {
  return !std::holds_alternative<std::monostate>(value);
}

/// "\"key\"".
std::string quoted(std::string_view key);

/// The value as a message shows it; "nothing" when it is absent.
std::string text_of(const ConfigValue& value);

/// ArgumentError: "\"key\": expected ..., got ...".
[[noreturn]] void fail_value(std::string_view key, const std::string& expected, const ConfigValue& got);

}  // namespace qat::arch
