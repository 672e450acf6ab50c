#include "qat/nn/without_initialization.hpp"

#include <ATen/ops/empty.h>

namespace qat::nn {
namespace {

thread_local bool skipping = false;
thread_local bool shapes_only = false;

}  // namespace

WithoutInitialization::WithoutInitialization() noexcept : before_(skipping) {
  skipping = true;
}

WithoutInitialization::~WithoutInitialization() {
  skipping = before_;
}

bool WithoutInitialization::active() noexcept {
  return skipping;
}

WithoutMemory::WithoutMemory() noexcept : before_(shapes_only) {
  shapes_only = true;
}

WithoutMemory::~WithoutMemory() {
  shapes_only = before_;
}

bool WithoutMemory::active() noexcept {
  return shapes_only;
}

at::Tensor empty_parameter(at::IntArrayRef shape) {
  const at::Device device(shapes_only ? at::kMeta : at::kCPU);
  return at::empty(shape, at::TensorOptions().dtype(at::kFloat).device(device));
}

}  // namespace qat::nn
