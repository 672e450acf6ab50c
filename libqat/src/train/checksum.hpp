#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace qat::train {

/// Folds 8-byte words into `state` by h = mix(h ^ word): every single damaged word changes the result. A last
/// word that is not whole is filled with zeros.
std::uint64_t checksum(std::span<const std::byte> bytes, std::uint64_t state = 0) noexcept;

}  // namespace qat::train
