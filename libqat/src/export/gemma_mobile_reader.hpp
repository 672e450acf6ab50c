#pragma once

#include <filesystem>

#include "export/coded_folder.hpp"

namespace qat {

/// Whether config.json says so.
bool is_gemma_mobile(const std::filesystem::path& path);

/// A folder with `quant_method: gemma`, of whatever origin. Activation scales that are 0 are left out.
/// FileError for what the format forbids.
CodedFolder open_gemma_mobile(const std::filesystem::path& path);

}  // namespace qat
