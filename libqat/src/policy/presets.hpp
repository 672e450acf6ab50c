#pragma once

// The policies that libqat ships with. They are kept as JSON because that is also how a user reads, copies
// and changes them.

#include <span>
#include <string_view>

namespace qat::policy {

struct Preset {
  std::string_view name;
  std::string_view summary;  ///< for whom, in a line
  std::string_view json;
};

/// In the order in which they are listed to a user.
std::span<const Preset> all_presets() noexcept;

}  // namespace qat::policy
