#pragma once

#include <optional>
#include <vector>

#include "train/batch_loss.hpp"
#include "train/code_monitor.hpp"
#include "train/diagnosis.hpp"
#include "train/run_state.hpp"

namespace qat::train {

/// Measures a run on one micro-batch that it does not train on, and keeps what a warning needs.
class Probe {
 public:
  /// Does nothing when `options` measure nothing or compare with no teacher.
  Probe(BatchLoss& loss, const Options& options);

  bool active() const noexcept { return !windows_.empty(); }
  /// KL of what would ship; the first is the start. The caller puts the model into its evaluation state.
  void measure();
  /// Called after each step, and with each measurement of the codes.
  void see_gradient(int64_t step, double norm);
  void see_codes(const CodeMonitor::Measurement& codes);
  /// -1 before the first measurement.
  double start() const;
  double last() const;
  RunFacts facts() const;
  /// "probe": float64[7], start, last, the gradient norms of the first and the last step, the highest flip
  /// rate, the last clip rate and scale drift.
  void add_state(std::vector<StateTensor>& tensors) const;

 private:
  double at(int64_t place) const;

  BatchLoss& loss_;
  std::vector<int64_t> windows_;
  std::optional<TeacherAnswer> answer_;  ///< unless it is as large as all logits
  at::Tensor memory_;
};

/// The windows of the first micro-batch that a run does not train on; those of a text that it reads more than
/// once it has seen before.
std::vector<int64_t> probe_windows(const TokenData& data, const Options& options);

}  // namespace qat::train
