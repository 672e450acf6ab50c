#pragma once

#include <memory>
#include <vector>

#include "train/training.hpp"

namespace qat::train {

/// Something that changes over the steps of a run. Which step it is decides what it does, and `add_state`
/// has all that it remembers, so that a resumed run goes on in the same bits.
class Schedule {
 public:
  virtual ~Schedule() = default;
  /// Before the forward passes of step 1, 2, ...; on resuming also for the last step done, before the state
  /// is read.
  virtual void begin_step(int64_t /*step*/) {}
  /// The gradients are complete.
  virtual void before_update(int64_t /*step*/) {}
  /// The optimizer has moved the parameters.
  virtual void after_update(int64_t /*step*/) {}
  virtual void add_state(std::vector<StateTensor>& /*tensors*/) const {}
};

using Schedules = std::vector<std::unique_ptr<Schedule>>;

/// The number of steps that a share of the run is.
int64_t steps_of(const Options& options, double share) noexcept;

// Each of these adds its schedule when the options ask for it. `training` must outlive them.

/// options.delay and options.blend.
void add_blend(Schedules& schedules, Training& training);
/// options.progressive. ArgumentError for a grid that does not divide a weight's width.
void add_progressive(Schedules& schedules, Training& training);
/// options.unfreeze.
void add_unfreeze(Schedules& schedules, Training& training);
/// options.oscillation.
void add_oscillation(Schedules& schedules, Training& training);
/// options.prox. ArgumentError for a grid whose levels do not rise or fall with its codes.
void add_prox(Schedules& schedules, Training& training);

/// Forward passes see what would ship, whatever a schedule has blended, for its lifetime.
class FullBlend {
 public:
  explicit FullBlend(PreparedModel& model);
  ~FullBlend();
  FullBlend(const FullBlend&) = delete;
  FullBlend& operator=(const FullBlend&) = delete;

 private:
  PreparedModel& model_;
  std::vector<double> before_;
};

}  // namespace qat::train
