#include "train/checksum.hpp"

#include <algorithm>
#include <cstring>

#include "train/permutation.hpp"

namespace qat::train {

std::uint64_t checksum(std::span<const std::byte> bytes, std::uint64_t state) noexcept {
  while (!bytes.empty()) {
    std::uint64_t word = 0;
    const std::size_t count = std::min(bytes.size(), sizeof word);
    std::memcpy(&word, bytes.data(), count);
    state = mix(state ^ word);
    bytes = bytes.subspan(count);
  }
  return state;
}

}  // namespace qat::train
