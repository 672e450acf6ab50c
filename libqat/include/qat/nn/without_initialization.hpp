#pragma once

#include <ATen/core/Tensor.h>

namespace qat::nn {

/// While it lives, qat::nn layers that this thread makes leave their parameters as the allocator gave them:
/// for modules whose numbers are read from a file right afterwards. Drawing 135 million random numbers first
/// takes longer than reading them.
class WithoutInitialization {
 public:
  WithoutInitialization() noexcept;
  ~WithoutInitialization();
  WithoutInitialization(const WithoutInitialization&) = delete;
  WithoutInitialization& operator=(const WithoutInitialization&) = delete;

  /// Whether one lives on this thread.
  static bool active() noexcept;

 private:
  bool before_;
};

/// While it lives, the parameters of qat::nn layers that this thread makes have shapes and no memory (device
/// "meta"): to ask a model of any size for its tensors.
class WithoutMemory {
 public:
  WithoutMemory() noexcept;
  ~WithoutMemory();
  WithoutMemory(const WithoutMemory&) = delete;
  WithoutMemory& operator=(const WithoutMemory&) = delete;

  /// Whether one lives on this thread.
  static bool active() noexcept;

 private:
  bool before_;
  WithoutInitialization uninitialized_;
};

/// float32 of that shape, unwritten; without memory while a WithoutMemory lives.
at::Tensor empty_parameter(at::IntArrayRef shape);

}  // namespace qat::nn
