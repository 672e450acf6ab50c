#include "qat/io/atomic_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <string>
#include <system_error>
#include <utility>

#include "io/temporary.hpp"
#include "qat/core/error.hpp"

namespace qat::io {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

}  // namespace

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  std::error_code ignored;
  const auto status = std::filesystem::status(path_, ignored);
  // A rename would put a plain file in the place of a device or pipe.
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    throw FileError("write: " + path_.string() + ": expected a path for a file, got a " +
                    (std::filesystem::is_directory(status) ? "directory" : "device or pipe"));
  }
  // Not mkstemp: its mode 0600 would ignore the user's umask.
  constexpr int kAttempts = 16;
  for (int attempt = 0; attempt < kAttempts && descriptor_ < 0; ++attempt) {
    temporary_ = temporary_beside(path_);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ < 0 && errno != EEXIST) break;
  }
  if (descriptor_ < 0) fail("create");
  buffer_.reserve(kBufferBytes);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* action) const {
  const int error = errno;
  throw FileError("write: " + path_.string() + ": expected to " + action + " the file, got " +
                  std::generic_category().message(error));
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  if (descriptor_ < 0)
    throw FileError("write: " + path_.string() + ": expected an open file, got a committed one");
  if (buffer_.size() + bytes.size() > kBufferBytes) flush();
  if (bytes.size() >= kBufferBytes) {
    send(bytes);
  } else {
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  }
  size_ += bytes.size();
}

void AtomicFile::write(std::string_view text) {
  write(std::as_bytes(std::span(text)));
}

void AtomicFile::write_zeros(std::uint64_t count) {
  static constexpr std::array<std::byte, 4096> kZeros{};
  while (count > 0) {
    const auto piece = std::min<std::uint64_t>(count, kZeros.size());
    write(std::span(kZeros).first(piece));
    count -= piece;
  }
}

void AtomicFile::flush() {
  send(buffer_);
  buffer_.clear();
}

void AtomicFile::send(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("write");
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::commit() {
  write(std::string_view());  // refuses a second commit
  flush();
  if (::fsync(descriptor_) != 0) fail("flush");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename");
  // The data is on the disk since fsync, so a failing close loses nothing.
  ::close(std::exchange(descriptor_, -1));
  sync_directory(path_.parent_path());
}

void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  write_file_atomically(path, std::as_bytes(std::span(text)));
}

}  // namespace qat::io
