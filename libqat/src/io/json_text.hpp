#pragma once

// JSON from a file that nobody vouches for.

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace qat::io {

/// Parses all of `text`. Throws FileError "`subject`: ..." for malformed JSON, a key that appears twice in
/// one object, and nesting deeper than `max_depth`.
nlohmann::json parse_json(std::string_view text, const std::string& subject, int max_depth);

}  // namespace qat::io
