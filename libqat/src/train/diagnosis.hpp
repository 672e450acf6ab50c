#pragma once

#include <string>
#include <vector>

namespace qat::train {

/// What decides whether a run needs a warning.
struct RunFacts {
  double probe_start = -1, probe_last = -1;  ///< KL in nats; -1 = not measured
  double gradient_start = 0, gradient_last = 0;
  double flip_rate = 0;                   ///< the highest
  double clip_rate = 0, scale_drift = 0;  ///< of the last measurement
  double epochs = 0;                      ///< how often the text has been read
  double tokens = 0;                      ///< trained on
};

/// Empty unless probe_last is above probe_start; else one warning that names the likely causes.
std::vector<std::string> diagnose(const RunFacts& facts);

}  // namespace qat::train
