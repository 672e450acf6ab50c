#pragma once

// What makes a checkpoint legal. Saving and loading ask the same questions; only the type of the error and
// the start of its message differ.

#include <string>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/grid/grid.hpp"

namespace qat::checkpoint {

/// Who complains, and about what: "save: " and ArgumentError, or "load: FILE: " and FileError.
struct Subject {
  std::string where;
  bool is_file;

  [[noreturn]] void fail(const std::string& key, const std::string& expected, const std::string& got) const;
};

/// "[2, 3]".
std::string shape_text(at::IntArrayRef shape);

/// The sizes that a quantized tensor's parts have: codes [R, N], scales [R, G, P], or [1, 1, P] where the
/// whole tensor shares them.
struct Sizes {
  const grid::Grid& grid;
  int64_t rows;
  int64_t width;

  int64_t scale_rows() const noexcept { return grid.scale_rows(rows); }
};

/// Checks grid and shape. `rows`: R, a product of the shape's first dimensions. Widths are bounded, so that
/// no later product overflows.
Sizes sizes_of(const Subject& subject, const std::string& key, const Scheme& scheme,
               const std::vector<int64_t>& shape, int64_t rows);

/// The same for a tensor whose codes say R.
Sizes sizes_of(const Subject& subject, const std::string& key, const QuantizedTensor& tensor);

/// Every tensor complete and legal on its grid, every alias with a target.
void check(const Subject& subject, const QuantizedCheckpoint& checkpoint);

}  // namespace qat::checkpoint
