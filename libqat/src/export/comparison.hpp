#pragma once

// Bit for bit comparison of what a file holds with what it should hold.

#include <cstdint>
#include <string>
#include <vector>

#include "export/hf_plan.hpp"
#include "qat/export/export.hpp"
#include "qat/grid/grid.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {

/// How many elements differ, and the first of them in words.
struct Mismatch {
  int64_t count = 0;
  std::string first;

  void add(int64_t row, int64_t column, const std::string& expected, const std::string& got);
};

/// Compares a tensor on a grid row by row: codes, stored scales, and the weights that both decode to.
class GridComparison {
 public:
  GridComparison(const grid::Grid& grid, int64_t width);

  /// Row `row` (counted as the checkpoint does). codes: int8[N], scales: float32[G, P].
  void add_row(int64_t row, const int8_t* codes, const float* scales, const int8_t* file_codes,
               const float* file_scales);
  /// What was found, under the tensor's name.
  void report(const std::string& tensor, std::vector<Difference>& differences) const;

 private:
  const grid::Grid& grid_;
  int64_t width_;
  std::vector<float> expected_, got_;
  Mismatch codes_, scales_, values_;
};

/// Compares `count` values of `bytes_per_value` bytes as bit patterns.
void compare_bits(int64_t row, const uint8_t* expected, const uint8_t* got, int64_t count,
                  int64_t bytes_per_value, Mismatch& mismatch);

/// Adds one difference when anything mismatched.
void report(const std::string& tensor, const char* what, const Mismatch& mismatch,
            std::vector<Difference>& differences);

/// A weight in a message, with all its digits.
std::string text_of(float value);

/// "[2, 3]".
std::string shape_text(const std::vector<int64_t>& shape);

/// Compares two tensors on grids: grid, shape, codes, stored scales, and the weights.
void compare_quantized(const std::string& key, const QuantizedTensor& expected, const QuantizedTensor& stored,
                       std::vector<Difference>& differences);

/// Compares a dequantized (or unquantized) tensor of a folder, in whatever float type, with the checkpoint's.
void compare_stored(const QuantizedCheckpoint& checkpoint, const HfTensor& tensor,
                    const io::SafetensorsTensor& stored, std::vector<Difference>& differences);

/// verify() for a file that begins as a GGUF.
std::vector<Difference> verify_gguf(const std::string& path, const QuantizedCheckpoint& checkpoint);

/// verify() for a Hugging Face folder.
std::vector<Difference> verify_hf(const std::string& path, const QuantizedCheckpoint& checkpoint);

/// verify() for a checkpoint file.
std::vector<Difference> verify_checkpoint(const std::string& path, const QuantizedCheckpoint& checkpoint);

}  // namespace qat
