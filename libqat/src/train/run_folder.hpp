#pragma once

#include <string>
#include <vector>

#include "train/run_state.hpp"
#include "train/telemetry.hpp"

namespace qat::train {

/// The files of one run; with the path "" every operation is a no-op.
class RunFolder {
 public:
  explicit RunFolder(std::string path);

  /// Makes the folder ready for a run from step 0. FileError when it holds the state of a run.
  void begin(const RunIdentity& identity);
  /// The step of the state that `resume` would load; errors as there.
  int64_t saved_step(const RunIdentity& identity) const;
  /// Loads the state, drops later telemetry, and returns the step.
  int64_t resume(const std::vector<StateTensor>& tensors, const RunIdentity& identity);
  void save(const std::vector<StateTensor>& tensors, int64_t step, const RunIdentity& identity);
  void log(const StepReport& report) { telemetry_.append(report); }

  const std::string& path() const noexcept { return path_; }

 private:
  /// The state's path; FileError when there is none.
  std::string state_file() const;
  std::string file(const char* name) const;

  std::string path_;
  Telemetry telemetry_;
};

}  // namespace qat::train
