#pragma once

// The rotary embedding of a GGUF file, and its description in a Hugging Face configuration.

#include <nlohmann/json_fwd.hpp>

#include "qat/arch/family.hpp"
#include "qat/arch/rope.hpp"
#include "qat/io/gguf.hpp"

namespace qat {

/// The double with the shortest decimal form of this float: 1e-05 for the float next to it, as in
/// config.json.
double shortest(float value);

/// From the keys `<architecture>.rope.scaling.*` and the tensor `rope_freqs.weight`. `theta`: its base;
/// `where`: the start of messages. UnsupportedError naming the key or the tensor for scalings that no
/// configuration says.
arch::Rope read_gguf_rope(const std::string& where, const io::GgufFile& file, const arch::Family& family,
                          double theta);

/// The object `rope_parameters` of transformers 5.
nlohmann::ordered_json rope_parameters(const arch::Rope& rope);

}  // namespace qat
