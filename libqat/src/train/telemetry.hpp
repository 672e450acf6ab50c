#pragma once

#include <cstdint>
#include <string>

#include "qat/train/trainer.hpp"

namespace qat::train {

/// telemetry.jsonl: one JSON object per step, in order.
class Telemetry {
 public:
  /// "" writes nothing. The file is created by the first line.
  explicit Telemetry(std::string path);

  /// Drops lines after `step` and whatever is not a line of ours (a process may have died while writing).
  /// keep_until(0) starts anew. FileError when the file cannot be replaced.
  void keep_until(int64_t step);
  /// Appends, and hands the line to the system before it returns. FileError when that fails.
  void append(const StepReport& report);

 private:
  std::string path_;
};

}  // namespace qat::train
