#pragma once

// How a writer is handed the bytes of a tensor: as they lie in memory, or produced piece by piece so that a
// large model never has to exist twice.

#include <cstddef>
#include <functional>
#include <span>
#include <variant>

namespace qat::io {

/// Takes the next piece of a tensor.
using ByteSink = std::function<void(std::span<const std::byte>)>;

/// Called once, when the tensor's turn has come; calls the sink with consecutive pieces.
using ByteProducer = std::function<void(const ByteSink&)>;

/// Writers check that exactly the number of bytes that dtype and shape ask for arrives.
using ByteSource = std::variant<std::span<const std::byte>, ByteProducer>;

}  // namespace qat::io
