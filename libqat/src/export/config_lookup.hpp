#pragma once

// A config.json as the readers of arch ask for its values.

#include <nlohmann/json_fwd.hpp>
#include <string_view>

#include "qat/arch/rope.hpp"

namespace qat {

/// The value at a dotted path ("rope_parameters.factor", "layer_types.3"), or null when there is none.
const nlohmann::json& find_path(const nlohmann::json& root, std::string_view path);

/// Looks up in `root`, which it does not copy.
arch::ConfigLookup lookup_in(const nlohmann::json& root);

}  // namespace qat
