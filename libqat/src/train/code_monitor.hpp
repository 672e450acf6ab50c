#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "train/parameters.hpp"
#include "train/run_state.hpp"

namespace qat::train {

/// How far training has moved the codes and scales of a model, on the grids that forward uses.
class CodeMonitor {
 public:
  /// Shares are of all weights together; 0 when there is none. See StepReport.
  struct Measurement {
    double flip_rate = 0;
    double oscillation = 0;
    double clip_rate = 0;
    double scale_drift = 0;
    double distance_to_grid = 0;
    std::map<std::string, double> dead_codes;
  };

  /// Takes the present codes and scales as the first measurement.
  explicit CodeMonitor(std::vector<TrainedWeight> weights);

  /// Measures, and remembers the codes for the next time.
  Measurement measure();
  /// Begins anew for weights whose forward now uses another grid.
  void follow_grids();
  /// "codes/<name>" int8[R, N] of the last measurement, "direction/<name>" int8[R, N], "start_scales/<name>"
  /// float32[R, G, P].
  void add_state(std::vector<StateTensor>& tensors) const;

 private:
  /// What is remembered of a weight.
  struct Memory {
    std::string grid;
    at::Tensor codes;
    at::Tensor direction;  ///< of each code's last change: -1, 1, or 0 before the first
    at::Tensor scales;     ///< stored ones of the start
  };
  struct Sums;
  static Memory remember(const TrainedWeight& weight);
  static void add(const TrainedWeight& weight, Memory& memory, Sums& sums);

  std::vector<TrainedWeight> weights_;
  std::vector<Memory> memories_;
};

}  // namespace qat::train
