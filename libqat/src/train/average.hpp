#pragma once

#include <vector>

#include "train/schedule.hpp"

namespace qat::train {

/// The exponential average of all trained parameters, scales included: what evaluation and the checkpoint
/// use. With decay d it is the plain mean of the first 1 / (1 - d) steps, and moves by 1 - d of the
/// difference afterwards.
class Average : public Schedule {
 public:
  explicit Average(Training& training);

  void begin_step(int64_t step) override;
  void after_update(int64_t step) override;
  /// "average/<name>".
  void add_state(std::vector<StateTensor>& tensors) const override;
  /// Exchanges parameters and averages; a second call takes it back.
  void swap();

 private:
  struct Entry {
    std::string name;
    at::Tensor value, average;
  };
  Training& training_;
  std::vector<Entry> entries_;
};

/// The averages stand in for the parameters during its lifetime; nothing happens with a null average.
class AverageScope {
 public:
  explicit AverageScope(Average* average) : average_(average) {
    if (average_) average_->swap();
  }
  ~AverageScope() {
    if (average_) average_->swap();
  }
  AverageScope(const AverageScope&) = delete;
  AverageScope& operator=(const AverageScope&) = delete;

 private:
  Average* average_;
};

}  // namespace qat::train
