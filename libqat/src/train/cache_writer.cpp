#include "train/cache_writer.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"
#include "qat/io/mapped_file.hpp"

namespace qat::train {
namespace {

void create(const std::string& path, const CacheKey& key) {
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  std::error_code error;
  if (!folder.empty()) std::filesystem::create_directories(folder, error);
  if (error)
    throw FileError("TeacherCache: " + folder.string() + ": expected a folder, got: " + error.message());
  if (!std::filesystem::exists(path)) io::write_file_atomically(path, write_header(key));
}

}  // namespace

CacheWriter::CacheWriter(std::string path, const CacheKey& key) : path_(std::move(path)), layout_(key) {
  create(path_, key);
  {
    const io::MappedFile file(path_);  // refuses what is not a regular file
    check_header(path_, file.bytes(), key);
  }
  descriptor_ = ::open(path_.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor_ < 0) fail("open");
  try {
    if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) fail("be the only process that builds");
    const io::MappedFile file(path_);
    index_ = index_cache(layout_, file.bytes(), /*verify=*/true);
    const std::size_t whole = file.size() - index_.torn;
    if (index_.torn > 0 && ::ftruncate(descriptor_, static_cast<off_t>(whole)) != 0) fail("shorten");
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

CacheWriter::~CacheWriter() {
  ::close(descriptor_);
}

void CacheWriter::fail(const char* action) const {
  const int error = errno;
  throw FileError("TeacherCache: " + path_ + ": expected to " + action + " the file, got " +
                  std::generic_category().message(error));
}

void CacheWriter::add(int64_t window, const WindowAnswer& answer) {
  const std::vector<std::byte> record = write_record(layout_, window, answer);
  const bool reuse = !index_.damaged.empty();
  const int64_t slot = reuse ? index_.damaged.back() : index_.whole;
  auto at = static_cast<off_t>(kCacheHeaderBytes + static_cast<std::size_t>(slot) * layout_.bytes);
  for (std::span<const std::byte> left(record); !left.empty();) {
    const ssize_t written = ::pwrite(descriptor_, left.data(), left.size(), at);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("write");
    left = left.subspan(static_cast<std::size_t>(written));
    at += written;
  }
  if (reuse) {
    index_.damaged.pop_back();
  } else {
    ++index_.whole;
  }
  index_.slots[window] = slot;
}

void CacheWriter::sync() {
  if (::fsync(descriptor_) != 0) fail("flush");
}

}  // namespace qat::train
