#pragma once

// Output that appears whole or not at all.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

namespace qat::io {

/// Writes `<path>.tmp-XXXXXX` beside the target and renames it onto `path` in `commit()`. Without a commit
/// the temporary file is removed and whatever stood at `path` before is untouched. Every failure (no such
/// directory, disk full, ...) is a FileError naming `path` and the system's message.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Appends; buffered.
  void write(std::span<const std::byte> bytes);
  /// The bytes of `text`.
  void write(std::string_view text);
  /// `count` zero bytes.
  void write_zeros(std::uint64_t count);

  /// Bytes appended so far.
  std::uint64_t size() const noexcept { return size_; }

  /// Flushes to the disk, then renames. The object takes no further writes.
  void commit();

 private:
  void flush();
  void send(std::span<const std::byte> bytes);
  [[noreturn]] void fail(const char* action) const;

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
  std::vector<std::byte> buffer_;
};

/// The whole file in one call, with the same promise.
void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes);
/// The same for text.
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

}  // namespace qat::io
