#pragma once

// How many bytes a decoder keeps between forward and backward, without running one. Parameters and the angles
// that all layers share are not counted.

#include <cstdint>

#include "qat/models/config.hpp"

namespace qat::models {

/// What the decoder computes, and how.
struct Forward {
  int64_t sequences = 1;
  int64_t tokens = 0;         ///< of each sequence
  int64_t compute_bytes = 2;  ///< of a number in the compute dtype: 4 for float32, 2 for bfloat16
  /// libqat's row kernels, which run on a CPU; LibTorch's operators elsewhere keep more.
  bool fused = true;
};

/// Bytes that layer `layer` keeps.
double activation_bytes(const DecoderConfig& config, int64_t layer, const Forward& forward);

/// Bytes that are kept outside the layers: their inputs per layer, the final norm, and what the head reads.
double outer_activation_bytes(const DecoderConfig& config, const Forward& forward);

}  // namespace qat::models
