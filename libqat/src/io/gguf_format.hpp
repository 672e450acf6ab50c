#pragma once

// What the reader and the writer of GGUF share.

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>

#include "qat/io/gguf.hpp"

namespace qat::io {

inline constexpr std::string_view kGgufMagic = "GGUF";
inline constexpr std::uint32_t kGgufVersion = 3;
inline constexpr std::uint32_t kGgufOldestVersion = 2;
inline constexpr std::uint32_t kGgufDefaultAlignment = 32;
inline constexpr std::string_view kGgufAlignmentKey = "general.alignment";
inline constexpr std::size_t kGgufMaxDims = 4;
/// ggml keeps names in 64 bytes with a NUL.
inline constexpr std::size_t kGgufLongestName = 63;

/// Bytes of a tensor; nothing when a size is negative, the first is no multiple of the block, or the number
/// overflows.
std::optional<std::uint64_t> gguf_bytes(const GgmlTypeSize& type,
                                        std::span<const std::int64_t> dims) noexcept;

/// Calls `visit(std::type_identity<T>())` with the C++ type of a scalar type id. False for kArray and unknown
/// ids.
template <class Visitor>
bool with_scalar_type(GgufType type, Visitor&& visit) {
  switch (type) {
    case GgufType::kU8:
      visit(std::type_identity<std::uint8_t>());
      return true;
    case GgufType::kI8:
      visit(std::type_identity<std::int8_t>());
      return true;
    case GgufType::kU16:
      visit(std::type_identity<std::uint16_t>());
      return true;
    case GgufType::kI16:
      visit(std::type_identity<std::int16_t>());
      return true;
    case GgufType::kU32:
      visit(std::type_identity<std::uint32_t>());
      return true;
    case GgufType::kI32:
      visit(std::type_identity<std::int32_t>());
      return true;
    case GgufType::kF32:
      visit(std::type_identity<float>());
      return true;
    case GgufType::kBool:
      visit(std::type_identity<bool>());
      return true;
    case GgufType::kString:
      visit(std::type_identity<std::string>());
      return true;
    case GgufType::kU64:
      visit(std::type_identity<std::uint64_t>());
      return true;
    case GgufType::kI64:
      visit(std::type_identity<std::int64_t>());
      return true;
    case GgufType::kF64:
      visit(std::type_identity<double>());
      return true;
    case GgufType::kArray:
      break;
  }
  return false;
}

}  // namespace qat::io
