#include "dtype.hpp"

#include <array>
#include <utility>

namespace qat::checkpoint {
namespace {

constexpr std::array<std::pair<at::ScalarType, io::Dtype>, 10> kTypes{{
    {at::kFloat, io::Dtype::kF32},
    {at::kHalf, io::Dtype::kF16},
    {at::kBFloat16, io::Dtype::kBF16},
    {at::kDouble, io::Dtype::kF64},
    {at::kByte, io::Dtype::kU8},
    {at::kChar, io::Dtype::kI8},
    {at::kShort, io::Dtype::kI16},
    {at::kInt, io::Dtype::kI32},
    {at::kLong, io::Dtype::kI64},
    {at::kBool, io::Dtype::kBool},
}};

}  // namespace

std::optional<io::Dtype> file_dtype(at::ScalarType dtype) noexcept {
  for (const auto& [tensor, file] : kTypes) {
    if (tensor == dtype) return file;
  }
  return std::nullopt;
}

std::optional<at::ScalarType> tensor_dtype(io::Dtype dtype) noexcept {
  for (const auto& [tensor, file] : kTypes) {
    if (file == dtype) return tensor;
  }
  return std::nullopt;
}

io::Dtype file_dtype(grid::DType dtype) noexcept {
  switch (dtype) {
    case grid::DType::kF32:
      return io::Dtype::kF32;
    case grid::DType::kF16:
      return io::Dtype::kF16;
    case grid::DType::kBF16:
      return io::Dtype::kBF16;
    case grid::DType::kU8:
      return io::Dtype::kU8;
    case grid::DType::kI8:
      return io::Dtype::kI8;
    case grid::DType::kE8M0:
      return io::Dtype::kF8E8M0;
    case grid::DType::kE4M3:
      return io::Dtype::kF8E4M3;
  }
  return io::Dtype::kF32;
}

std::string_view name_of(grid::DType dtype) noexcept {
  return io::to_string(file_dtype(dtype));
}

}  // namespace qat::checkpoint
