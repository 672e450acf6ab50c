#pragma once

// The lattice of one block: which scale turns its weights into whole steps.

#include <cstdint>
#include <optional>
#include <vector>

#include "qat/grid/grid.hpp"

namespace qat::ptq {

/// The type that a file kept weights in: significand bits, the hidden one included, and the least exponent.
enum class FileType { kBf16, kF16, kF32 };

/// The narrowest type that holds all values.
FileType file_type(const float* w, int64_t n);

/// w rounded to the type, to nearest, ties to even.
float rounded_to(FileType type, float w);

/// How a block is read where its weights leave a choice.
struct Reading {
  bool fitted = false;       ///< the largest step first, instead of the grid's rule
  bool bf16_scales = false;  ///< a bfloat16 scale, if one fits
};

struct BlockLattice {
  float scale = 0.0F;  ///< as the grid stores it
  bool exact = false;
  bool fitted = false;  ///< it is not what the grid's rule gives
  double error = 0.0;   ///< of the worst weight, in steps
};

/// Finds scales. Holds buffers: one per thread.
class LatticeFinder {
 public:
  /// n: weights in a block.
  LatticeFinder(const grid::Grid& grid, FileType type, int64_t n);

  /// w: float32[n], finite. The grid's own status where it has no scale for the block.
  grid::Status operator()(const float* w, Reading reading, BlockLattice& found);

 private:
  /// The scales for which codes * scale round to w all lie in [low, high].
  struct Interval {
    double low, high;
  };

  /// What a scale makes of a block.
  struct Fit {
    float scale;            ///< stored
    int64_t exact;          ///< weights
    double squares, worst;  ///< the errors, of the worst in steps
  };

  bool is_exact(const float* w, float scale, float& stored);
  std::optional<BlockLattice> exact_near(const float* w, float scale, Reading reading);
  std::optional<BlockLattice> by_fit(const float* w, float rule, Reading reading);
  BlockLattice nearest(const float* w, float rule);
  Interval interval(const float* w) const;
  Fit fit(const float* w, float scale);
  bool in_steps(const float* w, double scale) const;

  const grid::Grid& grid_;
  FileType type_;
  int64_t n_;
  std::vector<int8_t> codes_;
  std::vector<float> w_hat_;
};

}  // namespace qat::ptq
