// Every truncation and every single-byte change of a small file: it is read or refused, nothing else.

#include <functional>

#include "catch.hpp"
#include "io/gguf_parts.hpp"
#include "qat/core/error.hpp"
#include "qat/io/gguf.hpp"
#include "qat/io/safetensors.hpp"

using namespace qat::io;
using namespace qat::test;

namespace {

struct Tally {
  std::size_t read = 0;
  std::size_t refused = 0;
};

using Reader = std::function<void(const std::filesystem::path&)>;

void attempt(const Reader& read, const std::string& bytes, Tally& tally) {
  static const TemporaryFolder folder;
  put_file(folder / "x", bytes);
  try {
    read(folder / "x");
    ++tally.read;
  } catch (const qat::FileError&) {  // anything else ends the test
    ++tally.refused;
  }
}

Tally truncate_everywhere(const Reader& read, const std::string& bytes) {
  Tally tally;
  for (std::size_t length = 0; length < bytes.size(); ++length) attempt(read, bytes.substr(0, length), tally);
  return tally;
}

Tally corrupt_everywhere(const Reader& read, const std::string& bytes) {
  Tally tally;
  for (std::size_t position = 0; position < bytes.size(); ++position) {
    for (const int flip : {0x01, 0x04, 0x20, 0x80, 0xff}) {
      std::string changed = bytes;
      changed[position] = static_cast<char>(changed[position] ^ flip);
      attempt(read, changed, tally);
    }
  }
  return tally;
}

/// Touches every byte that the reader hands out, so that a span beyond the file would be noticed.
std::size_t sum(std::span<const std::byte> bytes) {
  std::size_t total = 0;
  for (const std::byte byte : bytes) total += static_cast<std::size_t>(byte);
  return total;
}

void read_gguf(const std::filesystem::path& path) {
  const GgufFile file(path);
  volatile std::size_t total = 0;
  for (const GgufTensor& tensor : file.tensors()) total = total + sum(tensor.data);
}

void read_safetensors(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  volatile std::size_t total = 0;
  for (const SafetensorsTensor& tensor : file.tensors()) total = total + sum(tensor.data);
}

std::string small_safetensors() {
  const TemporaryFolder folder;
  const std::string data = "twelve bytes";
  const auto bytes = as_bytes(data);
  write_safetensors(folder / "x",
                    {{"a", Dtype::kF32, {2}, bytes.first(8)}, {"b", Dtype::kI8, {2, 2}, bytes.last(4)}},
                    {{"format", "pt"}});
  return get_file(folder / "x");
}

}  // namespace

TEST_CASE("gguf: every truncation is refused, but for the padding of the last tensor") {
  const Tally tally = truncate_everywhere(read_gguf, small_gguf());
  REQUIRE(tally.read == 24);
}

TEST_CASE("gguf: every changed byte is read or refused") {
  const std::string bytes = small_gguf();
  const Tally tally = corrupt_everywhere(read_gguf, bytes);
  REQUIRE(tally.read + tally.refused == 5 * bytes.size());
  REQUIRE(tally.read > 5 * 100);  // the data of the tensors, at least
  REQUIRE(tally.refused > 500);
}

TEST_CASE("safetensors: every truncation is refused") {
  const Tally tally = truncate_everywhere(read_safetensors, small_safetensors());
  REQUIRE(tally.read == 0);
}

TEST_CASE("safetensors: every changed byte is read or refused") {
  const std::string bytes = small_safetensors();
  const Tally tally = corrupt_everywhere(read_safetensors, bytes);
  REQUIRE(tally.read + tally.refused == 5 * bytes.size());
  REQUIRE(tally.read >= 5 * 12);
  REQUIRE(tally.refused > 500);
}
