#pragma once

// Stored bytes -> float32, through the formats of `grid/`.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "qat/grid/ggml.hpp"

namespace qat::models {

/// Little-endian values of a float type, at any address -> float32 of `shape`.
at::Tensor read_floats(std::span<const std::byte> bytes, grid::DType dtype,
                       const std::vector<int64_t>& shape);

/// Rows of ggml blocks -> float32[R, N]; row i of the bytes becomes row `order[i]` (empty: i).
at::Tensor read_ggml(std::span<const std::byte> bytes, const grid::GgmlType& type,
                     const std::vector<int64_t>& shape, const std::vector<int64_t>& order);

}  // namespace qat::models
