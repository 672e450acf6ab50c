#pragma once

// Stored scale parameters as bytes.

#include <cstdint>

#include "qat/grid/grid.hpp"

namespace qat::grid {

/// value -> bytes[dtype_bytes(dtype)], little-endian, rounded as the type rounds; exact for what `store`
/// gives.
void put_stored(float value, DType dtype, uint8_t* bytes) noexcept;

/// The reverse of `put_stored`. The bytes may be anything, so the value may be infinite or NaN.
float get_stored(const uint8_t* bytes, DType dtype) noexcept;

/// The first of one block's parameters s'[P] that is not such as `store` returns (finite, and what the file
/// can hold), or -1 when all are.
int first_not_stored(const Grid& grid, const float* stored) noexcept;

}  // namespace qat::grid
