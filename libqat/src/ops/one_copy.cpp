// Refuses to be a process's second libqat: two copies would register every operator twice, and LibTorch's own
// message about that names neither file. The dynamic loader lets a library share a copy that was loaded under
// the same name, so this takes an explicit dlopen (torch.ops.load_library) of another file.

#include <link.h>

#include <string>
#include <string_view>
#include <vector>

#include "qat/core/error.hpp"

namespace qat::ops {
namespace {

constexpr std::string_view kLibrary = "/libqat.so";

/// The files of that name in this process, in the order of loading.
std::vector<std::string> loaded_copies() {
  std::vector<std::string> copies;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t /*size*/, void* data) {
        if (std::string_view(info->dlpi_name).ends_with(kLibrary)) {
          static_cast<std::vector<std::string>*>(data)->emplace_back(info->dlpi_name);
        }
        return 0;
      },
      &copies);
  return copies;
}

struct OneCopy {
  OneCopy() {
    const std::vector<std::string> copies = loaded_copies();
    if (copies.size() > 1) {
      throw Error("libqat: " + copies.back() + ": expected to be the only libqat of this process, got " +
                  copies.front() + " loaded before it");
    }
  }
};

// Before the registrations, which are initialised at the default priority.
[[gnu::init_priority(101)]] const OneCopy one_copy;

}  // namespace
}  // namespace qat::ops
