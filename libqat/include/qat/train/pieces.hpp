#pragma once

#include <cstdint>

namespace qat::train {

/// Rows of logits that exist at a time: `chunk`, or when that is 0 equal pieces of `rows` with at most 2^24
/// logits or 128 rows each, in multiples of 32.
int64_t piece_height(int64_t chunk, int64_t rows, int64_t vocabulary);

}  // namespace qat::train
