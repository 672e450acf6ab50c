#pragma once

// A folder that appears whole or not at all.

#include <filesystem>

namespace qat::io {

/// Makes the folder `<path>.tmp-XXXXXX` beside the target; `commit()` renames it to `path`. Without a commit
/// it is removed with everything in it, and whatever stands at `path` is untouched. Every failure is a
/// FileError naming `path` and the system's message.
class AtomicFolder {
 public:
  explicit AtomicFolder(const std::filesystem::path& path);
  ~AtomicFolder();
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;

  /// Where to write the files.
  const std::filesystem::path& staging() const noexcept { return staging_; }

  /// Renames the folder. FileError when something else than an empty folder stands at `path`.
  void commit();
  /// The same, and a folder that stands at `path` is removed; it is put back if the rename fails.
  void replace();

 private:
  [[noreturn]] void fail(const char* action, int error) const;

  std::filesystem::path path_;
  std::filesystem::path staging_;
};

}  // namespace qat::io
