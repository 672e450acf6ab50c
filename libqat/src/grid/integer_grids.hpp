#pragma once

// The integer families, whose names carry options: NAME[@SCALE_GRID][:DEQUANT_DTYPE]. Grids are made when
// they are first asked for and live as long as the program.

#include <optional>
#include <string_view>
#include <vector>

#include "qat/grid/grid.hpp"

namespace qat::grid {

/// A grid twice: as fast as this CPU allows, and as written in its codec.
struct GridPair {
  const Grid* fast;
  const Grid* reference;
};

/// The names without options, in a fixed order.
const std::vector<std::string_view>& integer_names();

/// What `name_options` gives for a name without options; null where no such integer grid exists.
const NameOptions* integer_options(std::string_view name);

/// The grid of a name that may carry options. Nothing when it is not one of these families'; then `bad` says
/// why, unless the part before the options is no name of theirs.
std::optional<GridPair> find_integer(std::string_view name, std::optional<BadName>& bad);

}  // namespace qat::grid
