#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "qat/train/options.hpp"

namespace qat::train {

/// AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with clipping by the global norm, by LibTorch's fused
/// kernel: one pass over parameter, gradient and moments. Clipping costs no pass of its own.
class AdamW {
 public:
  /// parameters: float32, any shape; shared, not copied. Moments start at 0.
  AdamW(std::vector<at::Tensor> parameters, const Options& options);

  /// Parameter number `index` takes its first update in the step after `step`: the correction of its moments'
  /// bias counts from there.
  void begin_after(std::size_t index, int64_t step) { begun_[index] = step; }
  /// Root of the sum of squares of all gradients, with undefined gradients as 0.
  double gradient_norm() const;
  /// Step number `step` (1, 2, ...) at `learning_rate`; gradients are scaled so that a norm of
  /// `gradient_norm` above the clip becomes the clip. Parameters without a gradient stay as they are.
  void update(int64_t step, double learning_rate, double gradient_norm);
  /// Drops all gradients.
  void clear_gradients();

  const std::vector<at::Tensor>& first_moments() const noexcept { return first_; }
  const std::vector<at::Tensor>& second_moments() const noexcept { return second_; }

 private:
  std::vector<at::Tensor> parameters_, first_, second_;
  std::vector<int64_t> begun_;
  double beta1_, beta2_, epsilon_, weight_decay_, clip_norm_;
};

}  // namespace qat::train
