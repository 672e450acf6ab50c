#pragma once

// The GGUF container of ggml and llama.cpp, versions 2 (read) and 3 (read and written), little-endian.
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "qat/io/byte_source.hpp"
#include "qat/io/mapped_file.hpp"

namespace qat::io {

/// Type ids of metadata values, as the file stores them.
enum class GgufType : std::uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

/// "u8", ..., "string", "array".
std::string_view to_string(GgufType type) noexcept;

/// A metadata value with its exact type, so that a key can be copied from file to file unchanged: the scalars
/// in the order of their type ids, then an array of each. (Arrays of arrays are outside what ggml reads.)
using GgufValue =
    std::variant<std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, std::uint32_t, std::int32_t, float,
                 bool, std::string, std::uint64_t, std::int64_t, double,  //
                 std::vector<std::uint8_t>, std::vector<std::int8_t>, std::vector<std::uint16_t>,
                 std::vector<std::int16_t>, std::vector<std::uint32_t>, std::vector<std::int32_t>,
                 std::vector<float>, std::vector<bool>, std::vector<std::string>, std::vector<std::uint64_t>,
                 std::vector<std::int64_t>, std::vector<double>>;

/// kArray for every array.
GgufType type_of(const GgufValue& value) noexcept;
/// The element's type for an array, `type_of` otherwise.
GgufType element_type_of(const GgufValue& value) noexcept;
/// "u32", "array of string", ...
std::string describe_type(const GgufValue& value);

/// Key-value pairs in insertion order. Keys are unique and not empty.
class GgufMetadata {
 public:
  /// Key and value.
  using Pair = std::pair<std::string, GgufValue>;

  /// Appends, or replaces the value in place when the key is already there. Throws ArgumentError for an empty
  /// key.
  void set(std::string key, GgufValue value);
  /// Null when there is none.
  const GgufValue* find(std::string_view key) const;

  std::size_t size() const noexcept { return pairs_.size(); }
  std::vector<Pair>::const_iterator begin() const noexcept { return pairs_.begin(); }
  std::vector<Pair>::const_iterator end() const noexcept { return pairs_.end(); }

 private:
  std::vector<Pair> pairs_;
  std::map<std::string, std::size_t, std::less<>> index_;
};

/// How many bytes a tensor type takes: `block_elements` consecutive elements of a row share `block_bytes`
/// bytes.
struct GgmlTypeSize {
  std::uint32_t id;
  /// ggml's own spelling: "F32", "Q4_0", ...
  std::string_view name;
  std::int64_t block_elements;
  std::int64_t block_bytes;
};

/// Every type id of ggml that files can hold; null for unknown and removed ids.
const GgmlTypeSize* ggml_type_size(std::uint32_t id) noexcept;

/// One tensor of an open file. `data` points into the map.
struct GgufTensor {
  std::string name;
  /// ggml's order, innermost first: a torch `[out, in]` matrix has dims {in, out}.
  std::vector<std::int64_t> dims;
  /// Id of the ggml type; `ggml_type_size(type)` is never null here.
  std::uint32_t type = 0;
  /// Position of `data` from the start of the file.
  std::uint64_t offset = 0;
  std::span<const std::byte> data;

  /// torch's order, outermost first.
  std::vector<std::int64_t> shape() const { return {dims.rbegin(), dims.rend()}; }
};

/// A mapped, fully validated file. Throws FileError naming file, key or tensor, and position for everything
/// malformed: truncation, counts and lengths beyond the file, duplicate names, unknown types, sizes that
/// overflow, offsets that are not the running sum of the padded sizes.
class GgufFile {
 public:
  explicit GgufFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const noexcept { return file_.path(); }
  std::uint32_t version() const noexcept { return version_; }
  std::uint64_t alignment() const noexcept { return alignment_; }
  const GgufMetadata& metadata() const noexcept { return metadata_; }
  /// The value of `key` as exactly T (one of GgufValue's alternatives). FileError when absent or of another
  /// type.
  template <class T>
  const T& get(std::string_view key) const {
    const GgufValue& value = require(key);
    if (const T* typed = std::get_if<T>(&value)) return *typed;
    fail_type(key, describe_type(GgufValue(T())), value);
  }
  /// The value of `key` from any integer type. FileError when absent, not an integer, or beyond int64.
  std::int64_t get_integer(std::string_view key) const;
  /// The value of `key` from any integer or floating type.
  double get_number(std::string_view key) const;

  /// In file order.
  const std::vector<GgufTensor>& tensors() const noexcept { return tensors_; }
  /// Null when there is none.
  const GgufTensor* find_tensor(std::string_view name) const;
  /// Throws FileError naming file and tensor when there is none.
  const GgufTensor& tensor(std::string_view name) const;

 private:
  const GgufValue& require(std::string_view key) const;
  [[noreturn]] void fail_type(std::string_view key, std::string_view expected, const GgufValue& got) const;

  MappedFile file_;
  std::uint32_t version_ = 0;
  std::uint64_t alignment_ = 0;
  GgufMetadata metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> index_;
};

/// One tensor to write; `dims` in ggml's order.
struct GgufEntry {
  std::string name;
  std::vector<std::int64_t> dims;
  std::uint32_t type = 0;
  ByteSource data;
};

/// Writes `path` atomically as version 3: metadata in its order, then the tensors in theirs, each padded with
/// zeros to `general.alignment` (u32, default 32). Throws ArgumentError naming the tensor for empty, long (64
/// bytes and more) or duplicate names, more than 4 dims, rows that are no multiple of the type's block, or a
/// wrong number of bytes; FileError when the file cannot be written.
void write_gguf(const std::filesystem::path& path, const GgufMetadata& metadata,
                const std::vector<GgufEntry>& entries);

}  // namespace qat::io
