#pragma once

// The same numbers on grids that a target stores.

#include <functional>
#include <string>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/export/export.hpp"

namespace qat {

/// Grids for a tensor, in the order in which they are tried; the tensor's own grid, where the target stores
/// it, comes alone. `natural`: whose reason is told when none holds the numbers. Without grids `reason` is
/// it.
struct Choice {
  std::vector<std::string> grids;
  std::size_t natural = 0;
  std::string reason;
};

using Choose = std::function<Choice(const QuantizedTensor& tensor)>;

/// A checkpoint that shares what did not change with the original.
struct Fitted {
  QuantizedCheckpoint checkpoint;
  std::vector<Obstacle> obstacles;  ///< for each tensor that none of its grids holds; it stays as it was
};

/// Tensors without numbers are placed on the first of their grids.
Fitted fit(const QuantizedCheckpoint& checkpoint, const Choose& choose);

}  // namespace qat
