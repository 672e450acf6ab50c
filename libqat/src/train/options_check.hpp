#pragma once

#include <string>

namespace qat::train {

/// Throws ArgumentError "options: path: expected ..., got ...".
[[noreturn]] void fail_option(const std::string& path, const std::string& expected, const std::string& got);

}  // namespace qat::train
