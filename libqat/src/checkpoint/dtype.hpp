#pragma once

// The same element types as torch, the file and the grids name them.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "qat/grid/grid.hpp"
#include "qat/io/safetensors.hpp"

namespace qat::checkpoint {

/// None where the checkpoint's file has no such type (complex, torch's own quantized types, ...).
std::optional<io::Dtype> file_dtype(at::ScalarType dtype) noexcept;
std::optional<at::ScalarType> tensor_dtype(io::Dtype dtype) noexcept;

io::Dtype file_dtype(grid::DType dtype) noexcept;
/// "F16".
std::string_view name_of(grid::DType dtype) noexcept;

}  // namespace qat::checkpoint
