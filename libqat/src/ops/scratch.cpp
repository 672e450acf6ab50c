#include "ops/scratch.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

namespace qat::ops {

at::Tensor scratch(at::IntArrayRef sizes, at::ScalarType dtype) {
  thread_local at::Tensor buffer;
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
  if (!buffer.defined() || buffer.numel() < bytes) {
    buffer.reset();  // before the larger one is allocated, so that both never exist together
    buffer = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
  }
  return at::from_blob(buffer.mutable_data_ptr(), sizes, at::TensorOptions().dtype(dtype));
}

}  // namespace qat::ops
