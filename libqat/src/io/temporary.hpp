#pragma once

// Names and durability of what is written beside its target first.

#include <filesystem>

namespace qat::io {

/// `<path>.tmp-XXXXXX` with random letters; nothing is created.
std::filesystem::path temporary_beside(const std::filesystem::path& path);

/// Makes a rename in this directory ("" = the current one) survive a loss of power. Best effort: some file
/// systems refuse it, and what was renamed is already complete.
void sync_directory(const std::filesystem::path& directory) noexcept;

}  // namespace qat::io
