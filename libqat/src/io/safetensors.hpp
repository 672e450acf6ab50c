#pragma once

// What the reader and the writer of safetensors share.

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "qat/io/safetensors.hpp"

namespace qat::io {

/// The format's bound on the JSON header, in bytes.
inline constexpr std::uint64_t kSafetensorsHeaderLimit = 100'000'000;

/// The header's key for the string map; no tensor can have this name.
inline constexpr std::string_view kSafetensorsMetadataKey = "__metadata__";

/// Bytes of a tensor; nothing when a size is negative, the number overflows or is not a whole number of
/// bytes.
std::optional<std::uint64_t> safetensors_bytes(Dtype dtype, std::span<const std::int64_t> shape) noexcept;

}  // namespace qat::io
