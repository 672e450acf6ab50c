#pragma once

#include "export/fitting.hpp"

namespace qat {

/// The types of a GGUF that may hold a tensor with the same numbers: its own, or else the type that llama.cpp
/// has for as many bits, then the others, small ones first.
Choice gguf_grids(const QuantizedTensor& tensor);

}  // namespace qat
