#include "qat/io/atomic_folder.hpp"

#include <cerrno>
#include <cstdio>
#include <string>
#include <system_error>

#include "io/temporary.hpp"
#include "qat/core/error.hpp"

namespace qat::io {
namespace {

/// Absolute and without a slash at the end, so that a name beside it can be made.
std::filesystem::path plain(const std::filesystem::path& path) {
  const auto whole = std::filesystem::absolute(path).lexically_normal();
  return whole.has_filename() ? whole : whole.parent_path();
}

}  // namespace

AtomicFolder::AtomicFolder(const std::filesystem::path& path) : path_(plain(path)) {
  std::error_code error;
  constexpr int kAttempts = 16;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    staging_ = temporary_beside(path_);
    if (std::filesystem::create_directory(staging_, error)) return;
    if (error) break;  // without an error the name was taken
  }
  fail("create", error.value());
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (!staging_.empty()) std::filesystem::remove_all(staging_, ignored);
}

void AtomicFolder::fail(const char* action, int error) const {
  throw FileError("write: " + path_.string() + ": expected to " + action + " the folder, got " +
                  std::generic_category().message(error));
}

void AtomicFolder::commit() {
  if (staging_.empty()) throw FileError("write: " + path_.string() + ": expected one commit, got a second");
  sync_directory(staging_);
  if (::rename(staging_.c_str(), path_.c_str()) != 0) fail("rename", errno);
  staging_.clear();
  sync_directory(path_.parent_path());
}

void AtomicFolder::replace() {
  if (!std::filesystem::is_directory(path_)) return commit();
  const auto old = temporary_beside(path_);
  if (::rename(path_.c_str(), old.c_str()) != 0) fail("move away", errno);
  try {
    commit();
  } catch (const FileError&) {
    ::rename(old.c_str(), path_.c_str());
    throw;
  }
  std::error_code ignored;
  std::filesystem::remove_all(old, ignored);
}

}  // namespace qat::io
