#pragma once

#include <optional>
#include <vector>

#include "train/adamw.hpp"
#include "train/code_monitor.hpp"
#include "train/parameters.hpp"
#include "train/scale_steps.hpp"

namespace qat::train {

/// What a run changes, and what it remembers of it.
struct Training {
  /// `model` must outlive it.
  Training(PreparedModel& prepared, const Options& settings);

  /// The norm of all gradients together.
  double gradient_norm() const;
  /// One optimizer step; see AdamW::update.
  void update(int64_t step, double gradient_norm);
  void clear_gradients();
  /// Forward uses other grids after step number `after`: learned scales are other tensors, and begin anew.
  void follow_grids(int64_t after);
  /// Latents, scales, moments, buffers, and the monitor's.
  void add_state(std::vector<StateTensor>& tensors) const;

  PreparedModel& model;
  const Options options;
  TrainedParameters parameters;
  std::vector<TrainedWeight> weights;
  AdamW optimizer;
  ScaleSteps scales;
  std::optional<CodeMonitor> monitor;
};

}  // namespace qat::train
