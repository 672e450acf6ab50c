#include "io/stream.hpp"

#include <string>

#include "io/text.hpp"
#include "qat/core/error.hpp"

namespace qat::io {

void stream(AtomicFile& file, const ByteSource& source, std::uint64_t expected, std::string_view function,
            std::string_view name) {
  std::uint64_t received = 0;
  const auto complain = [&](const std::string& got) {
    throw ArgumentError(std::string(function) + ": tensor " + printable(name) + ": expected " +
                        std::to_string(expected) + " bytes, got " + got);
  };
  const ByteSink sink = [&](std::span<const std::byte> bytes) {
    received += bytes.size();
    if (received > expected) complain("at least " + std::to_string(received));
    file.write(bytes);
  };
  if (const auto* bytes = std::get_if<std::span<const std::byte>>(&source)) {
    sink(*bytes);
  } else {
    std::get<ByteProducer>(source)(sink);
  }
  if (received != expected) complain(std::to_string(received));
}

}  // namespace qat::io
