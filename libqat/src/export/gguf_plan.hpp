#pragma once

// What a checkpoint looks like as a GGUF file, before anything is written: the writer follows the plan, and
// verify() compares a file with it.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "export/model_config.hpp"
#include "qat/checkpoint/checkpoint.hpp"
#include "qat/export/export.hpp"
#include "qat/grid/ggml.hpp"

namespace qat {

/// One tensor of the file. Legend: R rows (dimension 0), N values in a row, G blocks in a row, P scale
/// parameters per block.
struct PlannedTensor {
  std::string name;  ///< in the file
  std::string key;   ///< in the checkpoint; the name again for what is derived from the configuration
  const grid::GgmlType* type = nullptr;
  std::vector<int64_t> shape;  ///< torch's order
  int64_t rows = 0;            ///< R
  int64_t width = 0;           ///< N, 1 for a vector
  std::vector<int64_t> order;  ///< file row i holds row order[i] of the checkpoint; empty: the same order
  at::Tensor codes;            ///< int8[R, N] on the CPU, contiguous; undefined for floats
  at::Tensor scales;           ///< float32[R, G, P], likewise
  at::Tensor values;           ///< floats: exactly what the file holds, in its type

  bool is_float() const noexcept { return values.defined(); }
  int64_t row_bytes() const noexcept { return width / type->block * type->bytes; }
  int64_t row_in_checkpoint(int64_t row) const {
    return order.empty() ? row : order[static_cast<std::size_t>(row)];
  }
};

struct GgufPlan {
  ModelConfig config;
  std::vector<PlannedTensor> tensors;  ///< outside the layers first, then layer by layer

  int64_t bytes() const noexcept;  ///< of all tensors, without padding
};

/// `tokens`: how many the tokenizer has, for families whose files end the embedding there; nothing: as many
/// as the configuration says. Tensors on other grids are taken over to types of GGUF that hold the same
/// numbers. Throws ArgumentError for tensors that are missing (all of them), surplus or misshapen,
/// UnsupportedError for a grid or a shape that GGUF cannot hold. Messages name the tensor.
GgufPlan plan_gguf(const QuantizedCheckpoint& checkpoint, std::optional<int64_t> tokens = {});

/// The tensors whose numbers or shape no type of GGUF holds; when there are none, whatever else plan_gguf
/// finds unsupported, without a tensor's name.
std::vector<Obstacle> gguf_obstacles(const QuantizedCheckpoint& checkpoint);

}  // namespace qat
