#pragma once

// What an exported file would hold, from shapes alone: each writer says it of itself, so that a size is the
// size of the file.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/export/export.hpp"

namespace qat {

/// One tensor of a file.
struct FileTensor {
  std::string name;            ///< in the file
  std::string key;             ///< of the checkpoint's tensor; the name again for what is derived
  std::string type;            ///< "Q4_0", "U8", ...: the file's own name of it
  std::vector<int64_t> shape;  ///< in torch's order
  int64_t bytes = 0;
};

/// The tensors of a file, and why the target would refuse to write it.
struct ExportPlan {
  std::vector<FileTensor> tensors;  ///< in the file's order
  std::vector<Obstacle> obstacles;  ///< of those that need no numbers to be seen
};

/// The tensors that `target` would write for the checkpoint, whose own may lack numbers (see
/// checkpoint/outline.hpp). A tensor on a grid of another consumer is planned on the target's first grid
/// for it; whether that holds the same numbers, `can_export` says of a checkpoint with numbers. Headers,
/// tokenizer and padding come on top. `dtype`: of folders, as in ExportOptions. ArgumentError for an unknown
/// target or dtype and for a model that is incomplete.
ExportPlan plan_export(const QuantizedCheckpoint& checkpoint, std::string_view target,
                       std::string_view dtype = "bfloat16");

}  // namespace qat
