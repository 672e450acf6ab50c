#pragma once

// The model's configuration in a GGUF's metadata, as Hugging Face writes it.

#include <string>

#include "qat/arch/family.hpp"
#include "qat/io/gguf.hpp"

namespace qat {

/// config.json's text. `where`: the start of messages. FileError naming a key that is missing or of another
/// type, UnsupportedError naming one that changes what the model computes and that no configuration says.
std::string config_of_gguf(const std::string& where, const io::GgufFile& file, const arch::Family& family);

}  // namespace qat
