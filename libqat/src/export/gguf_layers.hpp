#pragma once

// From the keys of a GGUF file that say something of each layer to the fields of a Hugging Face
// configuration.

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "qat/arch/family.hpp"
#include "qat/io/gguf.hpp"

namespace qat {

/// Sets in `config` the fields behind the keys with `PerLayer`. `config` has `num_hidden_layers` and
/// `num_kv_shared_layers` (when there are any); `where` starts messages. FileError naming the key for a
/// missing one and for another number of layers, UnsupportedError naming it for what no configuration says.
void read_gguf_layers(const std::string& where, const io::GgufFile& file, const arch::Family& family,
                      nlohmann::ordered_json& config);

}  // namespace qat
