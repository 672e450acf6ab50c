#pragma once

#include <string>

#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

/// import_checkpoint() of a GGUF: its codes, scales and floats under Hugging Face's names and in that order
/// of rows. The file is the tokenizer's reference.
QuantizedCheckpoint read_gguf(const std::string& path);

}  // namespace qat
