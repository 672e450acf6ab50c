#pragma once

// Wording shared by the readers and writers of this folder.

#include <string>
#include <string_view>

namespace qat::io {

/// `text` in quotes, fit for a message whatever bytes a broken file holds: cut after 80 bytes, everything but
/// printable ASCII as \xNN.
std::string printable(std::string_view text);

}  // namespace qat::io
