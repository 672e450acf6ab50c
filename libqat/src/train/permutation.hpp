#pragma once

#include <cstdint>

namespace qat::train {

/// Where element `index` of 0..count-1 goes in the shuffle number `epoch` of stream `seed`: a bijection of
/// [0, count), computed without storing it and defined by integer arithmetic only, so that every platform
/// reads the data in the same order. A balanced Feistel network over the least even number of bits that holds
/// count, with splitmix64 (Steele et al. 2014) as round function; values that fall outside are sent through
/// the network again until they fall inside (cycle walking, Black and Rogaway 2002). count >= 1,
/// 0 <= index < count.
std::uint64_t permute(std::uint64_t index, std::uint64_t count, std::uint64_t seed,
                      std::uint64_t epoch) noexcept;

/// The finaliser of splitmix64: a bijection of 64-bit words that mixes every bit into every other.
std::uint64_t mix(std::uint64_t value) noexcept;

}  // namespace qat::train
