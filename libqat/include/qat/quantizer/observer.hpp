#pragma once

// The range of a layer's activations, seen once and then kept: what a static activation scale is made of.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace qat {

/// Keeps the largest magnitude of the activations it is shown while it calibrates, and counts the batches.
/// The recomputed forward of activation checkpointing is not counted again. NaN and infinities are refused.
class RangeObserver {
 public:
  /// Looks at one batch, without a gradient. Does nothing unless calibrating, and nothing inside a backward
  /// pass. x: floating point of any shape and device. NumericError for NaN and infinities, naming `tensor`.
  void observe(const at::Tensor& x, const std::string& tensor);

  /// Off at first. Switching it on continues with what was seen; `reset` forgets it.
  void set_calibrating(bool calibrating) noexcept { calibrating_ = calibrating; }
  bool calibrating() const noexcept { return calibrating_; }
  /// Forgets all batches.
  void reset() noexcept { restore(0.0, 0); }

  /// max|x| over all batches; 0 before the first.
  double largest() const noexcept { return largest_; }
  /// The number of batches seen.
  int64_t batches() const noexcept { return batches_; }
  /// Continues from a stored state.
  void restore(double largest, int64_t batches) noexcept {
    largest_ = largest;
    batches_ = batches;
  }

  /// The scale of int8_tensor_static as float32: max|x| / 127, and 0 while nothing but zeros was seen.
  float scale() const noexcept { return static_cast<float>(largest_ / 127.0); }

 private:
  double largest_ = 0.0;
  int64_t batches_ = 0;
  bool calibrating_ = false;
};

}  // namespace qat
