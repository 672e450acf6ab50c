#pragma once

#include <string>

#include "qat/export/export.hpp"

namespace qat {

/// The target "hf" of export_checkpoint.
void export_hf(const QuantizedCheckpoint& checkpoint, const std::string& path, const ExportOptions& options);

}  // namespace qat
