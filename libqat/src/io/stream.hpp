#pragma once

// From a ByteSource into a file, counted.

#include <cstdint>
#include <string_view>

#include "qat/io/atomic_file.hpp"
#include "qat/io/byte_source.hpp"

namespace qat::io {

/// Writes exactly `expected` bytes. Throws ArgumentError "`function`: tensor `name`: ..." when the source has
/// more or fewer.
void stream(AtomicFile& file, const ByteSource& source, std::uint64_t expected, std::string_view function,
            std::string_view name);

}  // namespace qat::io
