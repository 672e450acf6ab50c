#include "qat/io/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "qat/core/error.hpp"

namespace qat::io {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& got) {
  throw FileError("open: " + path.string() + ": expected a readable file, got " + got);
}

std::string system_message(int error) {
  return std::generic_category().message(error);
}

/// Closes on every way out; the map outlives its descriptor.
struct Descriptor {
  int number;
  ~Descriptor() { ::close(number); }
};

}  // namespace

MappedFile::MappedFile(std::filesystem::path path) : path_(std::move(path)) {
  // O_NONBLOCK: a named pipe must be refused below, not waited for.
  const int opened = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (opened < 0) fail(path_, system_message(errno));
  const Descriptor descriptor{opened};
  struct stat status{};
  if (::fstat(descriptor.number, &status) != 0) fail(path_, system_message(errno));
  if (S_ISDIR(status.st_mode)) fail(path_, "a directory");
  if (!S_ISREG(status.st_mode)) fail(path_, "something that is not a regular file");
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size == 0) return;  // mmap refuses a length of zero
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor.number, 0);
  if (address == MAP_FAILED) fail(path_, system_message(errno));
  bytes_ = {static_cast<const std::byte*>(address), size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace qat::io
