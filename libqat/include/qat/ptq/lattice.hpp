#pragma once

// Weights that already lie on a grid, though their file holds floats: what "-qat-q4_0-unquantized"
// checkpoints are. Their own scales are found, so that the grid's codes and scales stay what they were; the
// rule of the grid's quantizer finds others wherever no code is the one that the rule gives to the largest
// weight.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "qat/prepare/prepare.hpp"

namespace qat::ptq {

/// Where the scales of a tensor come from.
enum class LatticeRule {
  kConsumer,  ///< the grid's own rule gives them, within the rounding of the file
  kFitted,    ///< they were found by fitting: the largest for which the block's weights are whole steps
  kNone,      ///< most blocks lie on no lattice of this grid: scales by the rule, as a quantizer would do it
};

/// "consumer", "fitted" or "none".
std::string_view to_string(LatticeRule rule) noexcept;

/// What was found of one tensor.
struct Lattice {
  at::Tensor scales;  ///< float32[R, G, 1], as learned scales; [1, 1, 1] where the tensor shares one
  LatticeRule rule = LatticeRule::kNone;
  int64_t blocks = 0;
  /// Blocks whose weights are exactly code * scale, rounded to the file's type.
  int64_t exact = 0;
  double worst = 0.0;  ///< the largest error of a weight in the other blocks, in steps of its scale
};

/// Whether the grid has one scale per block and levels code * scale around 0; others have no such lattice.
bool has_lattice(std::string_view grid);

/// weight: float32[R, ...] with values of a narrower type, the narrowest of bfloat16, float16 and float32
/// that holds them all. A block's scale is a number for which all its products round to its weights. Where
/// the products leave a choice, a tensor's blocks are read alike: by the grid's rule if it explains (almost)
/// as many of them as fitting does, else by the largest step; and scales are bfloat16 numbers if most of them
/// are. ArgumentError for a grid without a lattice, a wrong dtype or shape; NumericError for weights that are
/// not finite, naming `tensor`.
Lattice find_lattice(const at::Tensor& weight, std::string_view grid, std::string_view tensor = "");

/// One tensor of `apply_lattice`.
struct LatticeTensor {
  std::string name;
  std::string grid;
  Lattice lattice;
};

/// Sets the learned scales of every quantized weight to those of its lattice, or by the grid's rule where
/// there is none. Latents stay. `model`: prepared with learned scales. `progress`: tensors done, in all, and
/// the next one's name; may throw to stop. ArgumentError for quantizers without learned scales.
std::vector<LatticeTensor> apply_lattice(
    PreparedModel& model,
    const std::function<void(int64_t done, int64_t total, const std::string& tensor)>& progress = {});

}  // namespace qat::ptq
