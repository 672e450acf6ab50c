#pragma once

#include <string>

#include "qat/export/export.hpp"

namespace qat {

/// The target "gguf" of export_checkpoint.
void export_gguf(const QuantizedCheckpoint& checkpoint, const std::string& path,
                 const ExportOptions& options);

}  // namespace qat
