#include "io/temporary.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <random>
#include <string>
#include <string_view>

namespace qat::io {

std::filesystem::path temporary_beside(const std::filesystem::path& path) {
  constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyz0123456789";
  std::random_device device;
  std::uniform_int_distribution<std::size_t> pick(0, kLetters.size() - 1);
  std::string suffix = ".tmp-";
  for (int i = 0; i < 6; ++i) suffix += kLetters[pick(device)];
  std::filesystem::path temporary = path;
  temporary += suffix;
  return temporary;
}

void sync_directory(const std::filesystem::path& directory) noexcept {
  const int descriptor =
      ::open(directory.empty() ? "." : directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  ::fsync(descriptor);
  ::close(descriptor);
}

}  // namespace qat::io
