#pragma once

// Reads little-endian values one after the other and never past the end.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "qat/core/error.hpp"

namespace qat::io {

class ByteCursor {
 public:
  /// `subject` starts every message: "read_gguf: path".
  ByteCursor(std::span<const std::byte> bytes, std::string subject)
      : bytes_(bytes), subject_(std::move(subject)) {}

  std::uint64_t offset() const noexcept { return offset_; }
  std::uint64_t remaining() const noexcept { return bytes_.size() - offset_; }

  /// `what` names the value in the message.
  std::span<const std::byte> take(std::uint64_t count, std::string_view what) {
    if (count > remaining()) {
      fail(what, std::to_string(count) + " bytes", "a file that ends after " + std::to_string(remaining()));
    }
    const auto result = bytes_.subspan(offset_, count);
    offset_ += count;
    return result;
  }

  template <class T>
    requires std::is_arithmetic_v<T>
  T number(std::string_view what) {
    static_assert(!std::is_same_v<T, bool>, "a stored bool can hold more than two values");
    T value;
    std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
    return value;
  }

  /// u64 length, then that many bytes.
  std::string_view string(std::string_view what) {
    const auto length = number<std::uint64_t>(what);
    const auto bytes = take(length, what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  /// A u64 count of things that take at least `least_bytes` each, so that no memory is set aside for more of
  /// them than the file can hold.
  std::uint64_t count(std::string_view what, std::uint64_t least_bytes) {
    const auto value = number<std::uint64_t>(what);
    if (value > remaining() / least_bytes) {
      fail(what, "at most " + std::to_string(remaining() / least_bytes) + " in the rest of the file",
           std::to_string(value));
    }
    return value;
  }

  [[noreturn]] void fail(std::string_view what, std::string_view expected, std::string_view got) const {
    throw FileError(subject_ + ": " + std::string(what) + " at byte " + std::to_string(offset_) +
                    ": expected " + std::string(expected) + ", got " + std::string(got));
  }

 private:
  std::span<const std::byte> bytes_;
  std::string subject_;
  std::uint64_t offset_ = 0;
};

}  // namespace qat::io
