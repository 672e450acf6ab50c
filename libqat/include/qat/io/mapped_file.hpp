#pragma once

// A file as bytes, without copying it into memory.

#include <cstddef>
#include <filesystem>
#include <span>

namespace qat::io {

/// A read-only memory map of a whole file. Movable; `bytes()` stays valid across a move and until
/// destruction. The file must not be shortened while it is mapped (the system answers with SIGBUS); replacing
/// it by rename, as `AtomicFile` does, is safe.
class MappedFile {
 public:
  /// Maps `path`; an empty file gives an empty span. Throws FileError (path and system message) when it is
  /// missing, unreadable or not a regular file.
  explicit MappedFile(std::filesystem::path path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const noexcept { return path_; }
  std::size_t size() const noexcept { return bytes_.size(); }
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

 private:
  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
};

}  // namespace qat::io
