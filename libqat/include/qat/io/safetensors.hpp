#pragma once

// The safetensors container: u64 little-endian header length | JSON header | tensor data.
// Format: https://github.com/huggingface/safetensors#format

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qat/io/byte_source.hpp"
#include "qat/io/mapped_file.hpp"

namespace qat::io {

/// Element types of the container, in its own spelling without the underscores.
enum class Dtype {
  kBool,
  kF4,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kF64,
  kI64,
  kU64,
};

/// "F32", "BF16", "F8_E4M3", ...
std::string_view to_string(Dtype dtype) noexcept;
/// The reverse; throws ArgumentError that lists the legal names.
Dtype dtype_from_name(std::string_view name);
/// Width of one element: 4 for F4, 8 for BOOL, ... 64.
int bit_width(Dtype dtype) noexcept;

/// One tensor of an open file. `data` points into the map; it is row-major, little-endian and, when the
/// writer of the file did not care, not aligned to its element type (read it with memcpy).
struct SafetensorsTensor {
  std::string name;
  Dtype dtype = Dtype::kF32;
  std::vector<std::int64_t> shape;
  /// Position of `data` from the start of the file.
  std::uint64_t offset = 0;
  std::span<const std::byte> data;
};

/// The header's `__metadata__`.
using SafetensorsMetadata = std::map<std::string, std::string>;

/// A mapped, fully validated file. Throws FileError naming file and tensor for everything the format forbids:
/// bad header length, malformed JSON, duplicate keys, unknown dtype, sizes that overflow or disagree, gaps,
/// overlap, trailing bytes.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const noexcept { return file_.path(); }
  /// In the order of their data.
  const std::vector<SafetensorsTensor>& tensors() const noexcept { return tensors_; }
  const SafetensorsMetadata& metadata() const noexcept { return metadata_; }
  /// Null when there is none.
  const SafetensorsTensor* find(std::string_view name) const;
  /// Throws FileError naming file and tensor when there is none.
  const SafetensorsTensor& at(std::string_view name) const;

 private:
  MappedFile file_;
  std::vector<SafetensorsTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> index_;
  SafetensorsMetadata metadata_;
};

/// The weights of a Hugging Face model directory: `model.safetensors`, or the shards listed in
/// `model.safetensors.index.json` (then exactly the tensors of its weight_map; FileError when one of them is
/// also in another shard, since two readers could then see two models). A path to a file opens that file
/// alone.
class SafetensorsDirectory {
 public:
  explicit SafetensorsDirectory(const std::filesystem::path& path);

  const std::filesystem::path& path() const noexcept { return path_; }
  const std::vector<SafetensorsFile>& files() const noexcept { return files_; }
  /// Sorted by name.
  std::vector<std::string> names() const;
  /// Null when there is none.
  const SafetensorsTensor* find(std::string_view name) const;
  /// Throws FileError naming the folder and the tensor when there is none.
  const SafetensorsTensor& at(std::string_view name) const;

 private:
  void open_shards(const std::filesystem::path& index_path);

  std::filesystem::path path_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, const SafetensorsTensor*, std::less<>> index_;
};

/// One tensor to write.
struct SafetensorsEntry {
  std::string name;
  Dtype dtype = Dtype::kF32;
  std::vector<std::int64_t> shape;
  ByteSource data;
};

/// Writes `path` atomically. The bytes depend only on the entries and the metadata, not on the order of the
/// entries: tensors go by descending element width, then name, and the header is padded with spaces to a
/// multiple of 8, so that every tensor is aligned to its element. Throws ArgumentError naming the tensor for
/// duplicate or reserved names, negative sizes or a wrong number of bytes, FileError when the file cannot be
/// written.
void write_safetensors(const std::filesystem::path& path, const std::vector<SafetensorsEntry>& entries,
                       const SafetensorsMetadata& metadata = {});

/// Writes the weights of a Hugging Face model into `directory`: `model.safetensors`, or, when the tensors
/// take more than `max_shard_bytes` (> 0), shards `model-00001-of-00003.safetensors` and their index. Shards
/// are filled in the order of the entries; one ends before the tensor that would exceed the limit, and a
/// tensor above the limit has a shard of its own. `metadata` goes into every file. Each file is written by
/// `write_safetensors`; returns their names, the index last.
std::vector<std::string> write_safetensors_directory(const std::filesystem::path& directory,
                                                     const std::vector<SafetensorsEntry>& entries,
                                                     std::int64_t max_shard_bytes,
                                                     const SafetensorsMetadata& metadata = {});

}  // namespace qat::io
