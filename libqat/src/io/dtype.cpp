#include <array>

#include "io/text.hpp"
#include "qat/core/error.hpp"
#include "qat/io/safetensors.hpp"

namespace qat::io {
namespace {

struct DtypeRow {
  Dtype dtype;
  std::string_view name;
  int bits;
};

/// In the order of the enumerators, so that a row is found by its number.
constexpr std::array<DtypeRow, 17> kDtypes{{
    {Dtype::kBool, "BOOL", 8},
    {Dtype::kF4, "F4", 4},
    {Dtype::kU8, "U8", 8},
    {Dtype::kI8, "I8", 8},
    {Dtype::kF8E5M2, "F8_E5M2", 8},
    {Dtype::kF8E4M3, "F8_E4M3", 8},
    {Dtype::kF8E8M0, "F8_E8M0", 8},
    {Dtype::kI16, "I16", 16},
    {Dtype::kU16, "U16", 16},
    {Dtype::kF16, "F16", 16},
    {Dtype::kBF16, "BF16", 16},
    {Dtype::kI32, "I32", 32},
    {Dtype::kU32, "U32", 32},
    {Dtype::kF32, "F32", 32},
    {Dtype::kF64, "F64", 64},
    {Dtype::kI64, "I64", 64},
    {Dtype::kU64, "U64", 64},
}};

constexpr bool rows_are_in_order() {
  for (std::size_t i = 0; i < kDtypes.size(); ++i) {
    if (static_cast<std::size_t>(kDtypes[i].dtype) != i) return false;
  }
  return true;
}
static_assert(rows_are_in_order());

const DtypeRow& row(Dtype dtype) noexcept {
  return kDtypes[static_cast<std::size_t>(dtype)];
}

}  // namespace

std::string_view to_string(Dtype dtype) noexcept {
  return row(dtype).name;
}

int bit_width(Dtype dtype) noexcept {
  return row(dtype).bits;
}

Dtype dtype_from_name(std::string_view name) {
  std::string legal;
  for (const DtypeRow& candidate : kDtypes) {
    if (candidate.name == name) return candidate.dtype;
    legal += (legal.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw ArgumentError("dtype: expected one of " + legal + ", got " + printable(name));
}

}  // namespace qat::io
