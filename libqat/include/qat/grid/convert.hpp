#pragma once

// The same numbers on another grid. Nothing is quantized or rounded here: either the other grid decodes to
// the same weights bit for bit, or the answer is a sentence that says why it cannot. (0 and -0 count as the
// same number: a negative scale decodes code 0 to -0.)
//
// How: a source block tells its step (the difference between two neighbouring codes) and its lowest weight.
// The target is offered scale parameters made of them, in a fixed order, beginning with the step itself; then
// parameters derived from the weights alone. Parameters that the target's file cannot hold are passed over,
// the others prove themselves: the target's own `encode` and `decode` have to give back the weights.

#include <cstdint>
#include <memory>
#include <string>

#include "qat/grid/grid.hpp"

namespace qat::grid {

class ConvertSource;
class ConvertTarget;

/// Converts rows of one grid to another. Holds buffers: one per thread.
class RowConverter {
 public:
  /// Both grids have codes; both divide n. `from_block`: weights that share the scales of a source block, at
  /// most n (a row of a grid with one scale per tensor has n).
  RowConverter(const Grid& from, int64_t from_block, const Grid& to, int64_t n);
  ~RowConverter();
  RowConverter(const RowConverter&) = delete;
  RowConverter& operator=(const RowConverter&) = delete;

  /// codes: legal int8[n], stored: float32[n / from_block, P] -> to_codes: int8[n], to_stored: float32[n /
  /// B', P'], which may not alias the input. Returns "" when done, otherwise the reason, which begins with
  /// the number of the target's block: "block 3: ...". What has been written is then unspecified.
  std::string convert(const int8_t* codes, const float* stored, int8_t* to_codes, float* to_stored);

 private:
  int64_t n_;
  std::unique_ptr<ConvertSource> source_;
  std::unique_ptr<ConvertTarget> target_;
};

}  // namespace qat::grid
