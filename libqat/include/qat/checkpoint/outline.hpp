#pragma once

// Tensors that have shapes and no memory (device "meta"): for questions of size about models that no machine
// at hand can hold.

#include <cstdint>
#include <string>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

/// What `quantize_tensor` gives for a weight of that shape, without numbers. The rows of a stack of matrices
/// [E, O, I] are those of its matrices. ArgumentError naming `key` for a float grid, and for a shape whose
/// rows the grid's block does not divide.
QuantizedTensor outline_tensor(const std::string& key, const std::vector<int64_t>& shape,
                               const Scheme& scheme);

}  // namespace qat
