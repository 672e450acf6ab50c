#pragma once

#include <filesystem>

#include "export/coded_folder.hpp"

namespace qat {

/// Whether config.json says so.
bool is_compressed_tensors(const std::filesystem::path& path);

/// A pack-quantized folder with symmetric integer weights and float activations, of whatever origin.
/// FileError for what the format forbids, UnsupportedError for its other formats.
CodedFolder open_compressed_tensors(const std::filesystem::path& path);

}  // namespace qat
