#include "qat/train/token_data.hpp"

#include <ATen/ops/empty.h>

#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <unordered_set>
#include <utility>
#include <vector>

#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"
#include "qat/io/mapped_file.hpp"
#include "train/permutation.hpp"

namespace qat::train {
namespace {

constexpr char kMagic[8] = {'Q', 'A', 'T', 'T', 'O', 'K', '1', '\0'};
constexpr std::size_t kHeaderBytes = 16;
constexpr std::size_t kIdBytes = sizeof(std::uint32_t);

/// Little-endian, from an address of any alignment.
std::uint32_t read_u32(const std::byte* bytes) noexcept {
  std::uint32_t value = 0;
  for (std::size_t i = 0; i < kIdBytes; ++i) value |= std::to_integer<std::uint32_t>(bytes[i]) << (8 * i);
  return value;
}

void write_u32(std::uint32_t value, std::byte* bytes) noexcept {
  for (std::size_t i = 0; i < kIdBytes; ++i) bytes[i] = static_cast<std::byte>(value >> (8 * i) & 0xffu);
}

void check_vocabulary(const std::string& function, int64_t vocabulary) {
  constexpr int64_t kMost = std::numeric_limits<std::uint32_t>::max();
  if (vocabulary < 1 || vocabulary > kMost) {
    throw ArgumentError(function + ": vocabulary: expected 1 to " + std::to_string(kMost) + ", got " +
                        std::to_string(vocabulary));
  }
}

/// tokens int64[n] as the little-endian ids of a file.
std::vector<std::byte> to_ids(const std::string& function, const at::Tensor& tokens, int64_t vocabulary) {
  check_vocabulary(function, vocabulary);
  if (!tokens.defined() || tokens.dim() != 1 || tokens.scalar_type() != at::kLong) {
    throw ArgumentError(function + ": tokens: expected int64[n], got " +
                        (tokens.defined() ? std::string(c10::toString(tokens.scalar_type())) + " with " +
                                                std::to_string(tokens.dim()) + " dimensions"
                                          : "nothing"));
  }
  if (tokens.size(0) == 0) throw ArgumentError(function + ": tokens: expected at least 1 token, got none");
  const at::Tensor dense = tokens.cpu().contiguous();
  const int64_t* ids = dense.const_data_ptr<int64_t>();
  std::vector<std::byte> bytes(static_cast<std::size_t>(dense.size(0)) * kIdBytes);
  for (int64_t i = 0; i < dense.size(0); ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) {
      throw ArgumentError(function + ": tokens[" + std::to_string(i) + "]: expected an id in [0, " +
                          std::to_string(vocabulary) + "), got " + std::to_string(ids[i]));
    }
    write_u32(static_cast<std::uint32_t>(ids[i]), bytes.data() + static_cast<std::size_t>(i) * kIdBytes);
  }
  return bytes;
}

void check_batch(const char* subject, bool ok, const std::string& expected, int64_t got) {
  if (ok) return;
  throw ArgumentError(std::string("TokenData::batch: ") + subject + ": expected " + expected + ", got " +
                      std::to_string(got));
}

}  // namespace

struct TokenData::Storage {
  std::optional<io::MappedFile> file;  ///< keeps `ids` alive when they are mapped
  std::vector<std::byte> memory;       ///< the same when they are not
  std::span<const std::byte> ids;      ///< little-endian uint32[n]
  int64_t vocabulary = 0;
  std::uint64_t fingerprint = 0;

  int64_t size() const noexcept { return static_cast<int64_t>(ids.size() / kIdBytes); }
  std::uint32_t id(int64_t index) const noexcept {
    return read_u32(ids.data() + static_cast<std::size_t>(index) * kIdBytes);
  }

  /// Hashes, and returns the first position whose id is outside the vocabulary, or -1.
  int64_t scan() noexcept {
    constexpr std::uint64_t kPrime = 0x100000001b3u, kBasis = 0xcbf29ce484222325u;
    fingerprint = (kBasis ^ static_cast<std::uint64_t>(vocabulary)) * kPrime;
    for (int64_t i = 0; i < size(); ++i) {
      if (id(i) >= vocabulary) return i;
      fingerprint = (fingerprint ^ id(i)) * kPrime;
    }
    return -1;
  }
};

TokenData::TokenData(std::shared_ptr<const Storage> storage) : storage_(std::move(storage)) {}

TokenData TokenData::open(const std::string& path) {
  const auto fail = [&](const std::string& subject, const std::string& expected, const std::string& got) {
    throw FileError("TokenData::open: " + path + ": " + subject + ": expected " + expected + ", got " + got);
  };
  auto storage = std::make_shared<Storage>();
  storage->file.emplace(path);
  const std::span<const std::byte> bytes = storage->file->bytes();
  if (bytes.size() < kHeaderBytes || std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0) {
    fail("header", "16 bytes that begin with QATTOK1",
         std::to_string(bytes.size()) + " bytes of another kind");
  }
  storage->vocabulary = read_u32(bytes.data() + 8);
  if (storage->vocabulary == 0) fail("vocabulary", "at least 1", "0");
  if (const std::uint32_t reserved = read_u32(bytes.data() + 12); reserved != 0) {
    fail("reserved word", "0", std::to_string(reserved));
  }
  storage->ids = bytes.subspan(kHeaderBytes);
  if (storage->ids.empty() || storage->ids.size() % kIdBytes != 0) {
    fail("ids", "a positive multiple of 4 bytes", std::to_string(storage->ids.size()) + " bytes");
  }
  if (const int64_t bad = storage->scan(); bad >= 0) {
    fail("token " + std::to_string(bad),
         "an id below the vocabulary of " + std::to_string(storage->vocabulary),
         std::to_string(storage->id(bad)));
  }
  return TokenData(std::move(storage));
}

TokenData TokenData::from_tensor(const at::Tensor& tokens, int64_t vocabulary) {
  auto storage = std::make_shared<Storage>();
  storage->memory = to_ids("TokenData::from_tensor", tokens, vocabulary);
  storage->ids = storage->memory;
  storage->vocabulary = vocabulary;
  storage->scan();
  return TokenData(std::move(storage));
}

int64_t TokenData::size() const noexcept {
  return storage_->size();
}
int64_t TokenData::vocabulary() const noexcept {
  return storage_->vocabulary;
}
std::uint64_t TokenData::fingerprint() const noexcept {
  return storage_->fingerprint;
}

std::vector<int64_t> TokenData::windows(int64_t index, int64_t batch_size, int64_t length,
                                        int64_t seed) const {
  check_batch("batch_size", batch_size >= 1, "at least 1", batch_size);
  check_batch("length", length >= 1, "at least 1", length);
  check_batch("index", index >= 0 && index < std::numeric_limits<int64_t>::max() / batch_size,
              "a number of batches that 64 bits can count", index);
  check_batch("text", size() >= length, "at least one window of " + std::to_string(length) + " tokens",
              size());
  const int64_t count = size() / length;
  std::vector<int64_t> windows;
  for (int64_t place = index * batch_size; place < (index + 1) * batch_size; ++place) {
    windows.push_back(static_cast<int64_t>(
        permute(static_cast<std::uint64_t>(place % count), static_cast<std::uint64_t>(count),
                static_cast<std::uint64_t>(seed), static_cast<std::uint64_t>(place / count))));
  }
  return windows;
}

std::vector<int64_t> TokenData::first_windows(int64_t batches, int64_t batch_size, int64_t length,
                                              int64_t seed, int64_t most) const {
  std::vector<int64_t> found;
  std::unordered_set<int64_t> seen;
  for (int64_t index = 0; index < batches; ++index) {
    for (const int64_t window : windows(index, batch_size, length, seed)) {
      if (static_cast<int64_t>(found.size()) >= most) return found;
      if (seen.insert(window).second) found.push_back(window);
    }
    // An epoch reads every window: what follows was there.
    if (static_cast<int64_t>(seen.size()) == size() / length) break;
  }
  return found;
}

at::Tensor TokenData::read(const std::vector<int64_t>& windows, int64_t length) const {
  check_batch("length", length >= 1, "at least 1", length);
  at::Tensor result = at::empty({static_cast<int64_t>(windows.size()), length}, at::TensorOptions(at::kLong));
  int64_t* out = result.mutable_data_ptr<int64_t>();
  for (const int64_t window : windows) {
    check_batch("window", window >= 0 && window < size() / length,
                "0 to " + std::to_string(size() / length - 1), window);
    for (int64_t i = 0; i < length; ++i) *out++ = storage_->id(window * length + i);
  }
  return result;
}

at::Tensor TokenData::batch(int64_t index, int64_t batch_size, int64_t length, int64_t seed) const {
  return read(windows(index, batch_size, length, seed), length);
}

at::Tensor TokenData::tokens() const {
  at::Tensor result = at::empty({size()}, at::TensorOptions(at::kLong));
  int64_t* out = result.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < size(); ++i) out[i] = storage_->id(i);
  return result;
}

void write_tokens(const std::string& path, const at::Tensor& tokens, int64_t vocabulary) {
  const std::vector<std::byte> ids = to_ids("write_tokens", tokens, vocabulary);
  std::byte header[kHeaderBytes] = {};
  std::memcpy(header, kMagic, sizeof kMagic);
  write_u32(static_cast<std::uint32_t>(vocabulary), header + 8);
  io::AtomicFile file(path);
  file.write(std::span<const std::byte>(header));
  file.write(ids);
  file.commit();
}

}  // namespace qat::train
