#pragma once

// ggml's file types: ids, block sizes and the bit layout of one block. (ggml/include/ggml.h `ggml_type`,
// ggml/src/ggml-common.h `block_*`; layouts are listed in docs/numerics.md.)

#include <cstdint>
#include <string_view>

#include "qat/grid/grid.hpp"

namespace qat::grid {

/// One ggml tensor type that libqat can read and write.
struct GgmlType {
  uint32_t id;            ///< `ggml_type` in a GGUF file
  std::string_view name;  ///< ggml's spelling: "Q4_0"
  std::string_view grid;  ///< the grid of the same numbers: "q4_0"
  int64_t block;          ///< weights per block
  int64_t bytes;          ///< bytes per block
  uint32_t file_type;     ///< `general.file_type` (llama_ftype) of a file made mostly of it
  /// n codes (int8[n]) and stored scales (float32[n / B, P], B of the grid) -> ggml blocks. Null for float
  /// grids.
  void (*pack)(const int8_t* codes, const float* stored, int64_t n, uint8_t* bytes);
  /// The reverse of `pack`: what ggml decodes, for every bit pattern of a block. `pack` gives the same
  /// pattern back, but for bytes of tq1_0 that no packing yields and nvfp4's sign bits. Null for float grids.
  void (*unpack)(const uint8_t* bytes, int64_t n, int8_t* codes, float* stored);
};

/// Lookups; null when unknown to libqat.
const GgmlType* ggml_type(uint32_t id) noexcept;
/// The same by the name of the grid.
const GgmlType* ggml_type_of_grid(std::string_view grid) noexcept;

}  // namespace qat::grid
