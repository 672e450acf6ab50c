#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "train/adamw.hpp"
#include "train/run_state.hpp"

namespace qat::train {

/// A learned scale that trains.
struct TrainedScale {
  std::string name;        ///< "<weight's key>_scales", or that of an activation scale
  at::Tensor value;        ///< float32[R, G, P] or, of SEQ, float32[R, G, F]; of activations float32[1, 1, 1]
  std::vector<int> sizes;  ///< how many of a block's parameters are of one kind, see parameter_sizes
};

/// AdamW over learned scales, in units of their own: a step moves a scale by rate * unit times what AdamW
/// would move a weight at rate 1, where unit is the mean |scale| of its tensor and kind when the run began
/// (of activations: when their calibration was over).
/// So one rate fits scales of all sizes. No weight decay.
class ScaleSteps {
 public:
  /// after: the step after which they begin, see AdamW::begin_after.
  ScaleSteps(std::vector<TrainedScale> scales, const Options& options, int64_t after);

  /// As those of AdamW. rate: relative.
  double gradient_norm() const;
  void update(int64_t step, double rate, double gradient_norm);
  void clear_gradients();
  /// "exp_avg/<name>", "exp_avg_sq/<name>", "scale_unit/<name>": float32[P].
  void add_state(std::vector<StateTensor>& tensors) const;

  const std::vector<TrainedScale>& scales() const noexcept { return scales_; }
  /// See AdamW::begin_after.
  void begin_after(std::size_t index, int64_t step) { adam_.begin_after(index, step); }

 private:
  std::vector<TrainedScale> scales_;
  std::vector<at::Tensor> units_;
  std::vector<at::Tensor> moves_;  ///< zeros, which AdamW turns into a step
  AdamW adam_;
};

/// The mean |scale| of each kind of a block's parameters, repeated for all of that kind. scales: float32[R,
/// G, P]; sizes: parameters of each kind, P in all -> float32[P].
at::Tensor field_means(const at::Tensor& scales, const std::vector<int>& sizes);

}  // namespace qat::train
