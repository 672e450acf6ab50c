#pragma once

// Many programs take float weights and quantize them by themselves (llama-quantize, a framework's loader).
// Whether such a program gets back what was trained is a property of the trained codes and scales: a grid's
// own rule finds a block's scale from its weights, and finds the trained one only if, for example, a Q4_0
// block uses its code -8 and its stored scale is what that weight divides to.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

/// What becomes of one tensor that is dequantized, written in a float type and quantized again by its grid's
/// own rule.
struct Requantization {
  std::string tensor;  ///< state_dict key
  std::string grid;
  int64_t blocks = 0;          ///< groups of weights that share their scales
  int64_t changed_blocks = 0;  ///< whose codes or stored scales come out differently
  int64_t weights = 0;
  int64_t rounded_weights = 0;  ///< that the float type does not hold exactly

  bool exact() const noexcept { return changed_blocks == 0; }
};

/// One entry per quantized tensor, by key. `dtype`: "float32", "float16" or "bfloat16", the type in which the
/// dequantized weights are written (rounded to nearest, ties to even). ArgumentError for another dtype,
/// NumericError naming tensor and row for a weight beyond the dtype's range.
std::vector<Requantization> requantization_report(const QuantizedCheckpoint& checkpoint,
                                                  std::string_view dtype = "float32");

}  // namespace qat
