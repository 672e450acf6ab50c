#pragma once

#include <ATen/core/Tensor.h>

namespace qat::ops {

/// An uninitialised contiguous CPU tensor in memory that the calling thread reuses: valid until its next
/// call of this function, so it must neither leave the operator that asked for it nor be asked for twice in
/// one. It grows to the largest request and is freed when the thread ends.
at::Tensor scratch(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace qat::ops
