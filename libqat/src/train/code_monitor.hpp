#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "qat/prepare/prepare.hpp"

namespace qat::train {

/// How far training has moved the codes of a model.
class CodeMonitor {
 public:
  struct Measurement {
    double flip_rate;         ///< share of codes that differ from the last measurement
    double distance_to_grid;  ///< RMS(w_hat - w) / RMS(w)
  };

  /// A weight on an integer grid.
  struct Weight {
    std::string name;
    at::Tensor latent;  ///< float32[R, ...]
    std::string grid;
    ScaleRule scale = ScaleRule::kReference;
    at::Tensor scales = {};  ///< the learned ones, for kLearned
  };

  /// Takes the present codes as the first measurement.
  explicit CodeMonitor(std::vector<Weight> weights);

  /// Over all weights together; {0, 0} when there is none.
  Measurement measure();

  const std::vector<Weight>& weights() const noexcept { return weights_; }
  /// Parallel to weights(): int8[R, N] of the last measurement, part of the run's state.
  const std::vector<at::Tensor>& codes() const noexcept { return codes_; }

 private:
  std::vector<Weight> weights_;
  std::vector<at::Tensor> codes_;
};

/// The weights of `model` that are on an integer grid and require a gradient.
std::vector<CodeMonitor::Weight> trained_weights(const PreparedModel& model);

}  // namespace qat::train
