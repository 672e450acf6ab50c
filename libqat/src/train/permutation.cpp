#include "train/permutation.hpp"

#include <bit>

namespace qat::train {
namespace {

constexpr int kRounds = 8;

}  // namespace

std::uint64_t mix(std::uint64_t value) noexcept {
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

std::uint64_t permute(std::uint64_t index, std::uint64_t count, std::uint64_t seed,
                      std::uint64_t epoch) noexcept {
  const std::uint64_t key = mix(mix(seed) ^ epoch);
  const int half = (std::bit_width(count - 1) + 1) / 2;
  const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
  do {
    std::uint64_t left = index >> half, right = index & mask;
    for (int round = 0; round < kRounds; ++round) {
      const std::uint64_t next = left ^ (mix((key + static_cast<std::uint64_t>(round)) ^ mix(right)) & mask);
      left = right;
      right = next;
    }
    index = (left << half) | right;
  } while (index >= count);
  return index;
}

}  // namespace qat::train
