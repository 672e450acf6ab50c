#pragma once

// GGUF files byte by byte, independent of the writer under test.

#include <string>

#include "io/files.hpp"

namespace qat::test {

/// Magic, version and counts.
inline std::string gguf_start(std::uint64_t tensors, std::uint64_t keys, std::uint32_t version = 3) {
  return "GGUF" + le(version) + le(tensors) + le(keys);
}

/// A key and its type id; the value follows.
inline std::string gguf_key(std::string_view key, std::uint32_t type) {
  return gguf_string(key) + le(type);
}

inline std::string gguf_info(std::string_view name, const std::vector<std::int64_t>& dims, std::uint32_t type,
                             std::uint64_t offset) {
  std::string info = gguf_string(name) + le(static_cast<std::uint32_t>(dims.size()));
  for (const std::int64_t dim : dims) info += le(dim);
  return info + le(type) + le(offset);
}

inline std::string padded(std::string bytes, std::size_t alignment = 32) {
  bytes.append((alignment - bytes.size() % alignment) % alignment, '\0');
  return bytes;
}

/// Six keys and two tensors: m, Q8_0 [2, 32] of 68 times 'q', and v, F32 [2] of 1 and 2.
inline std::string small_gguf() {
  constexpr std::uint32_t kU32 = 4, kF32 = 6, kBool = 7, kString = 8, kArray = 9, kI16 = 3;
  std::string bytes = gguf_start(2, 6);
  bytes += gguf_key("general.architecture", kString) + gguf_string("llama");
  bytes += gguf_key("n", kU32) + le<std::uint32_t>(7);
  bytes += gguf_key("eps", kF32) + le(0.5f);
  bytes += gguf_key("flag", kBool) + '\1';
  bytes +=
      gguf_key("tokens", kArray) + le(kString) + le<std::uint64_t>(2) + gguf_string("a") + gguf_string("");
  bytes += gguf_key("none", kArray) + le(kI16) + le<std::uint64_t>(0);
  bytes += gguf_info("m", {32, 2}, 8, 0) + gguf_info("v", {2}, 0, 96);
  return padded(bytes) + padded(std::string(68, 'q')) + padded(le(1.0f) + le(2.0f));
}

}  // namespace qat::test
