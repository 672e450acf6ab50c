#include <algorithm>
#include <cmath>
#include <regex>
#include <set>
#include <string>

#include "train/schedule.hpp"

namespace qat::train {
namespace {

/// The number of the block that a parameter is in ("model.layers.12.mlp..." -> 12); -1 for none.
int64_t block_of(const std::string& name) {
  static const std::regex number("\\.(\\d{1,9})\\.");
  std::smatch found;
  return std::regex_search(name, found, number) ? std::stoll(found[1]) : -1;
}

/// One block after another begins to train; what is in no block trains throughout.
class UnfreezeSchedule : public Schedule {
 public:
  explicit UnfreezeSchedule(Training& training) : training_(training) {
    std::set<int64_t> blocks;
    for (const NamedParameter& parameter : training.parameters.trained()) {
      if (const int64_t block = block_of(parameter.name); block >= 0) blocks.insert(block);
    }
    order_.assign(blocks.begin(), blocks.end());
    if (training.options.unfreeze.from == "last") std::reverse(order_.begin(), order_.end());
  }

  void begin_step(int64_t step) override {
    const auto& trained = training_.parameters.trained();
    for (std::size_t i = 0; i < trained.size(); ++i) {
      const int64_t wait = held_steps(trained[i].name);
      trained[i].value.set_requires_grad(step > wait);
      training_.optimizer.begin_after(i, wait);
    }
    const auto& scales = training_.scales.scales();
    for (std::size_t i = 0; i < scales.size(); ++i) {
      const int64_t wait = held_steps(scales[i].name);
      scales[i].value.set_requires_grad(step > wait);
      training_.scales.begin_after(i, wait);
    }
  }

 private:
  /// The steps in which a parameter does not train yet.
  int64_t held_steps(const std::string& name) const {
    const auto place = std::find(order_.begin(), order_.end(), block_of(name));
    if (place == order_.end() || order_.size() < 2) return 0;
    const auto rank = static_cast<double>(place - order_.begin());
    const auto last = static_cast<double>(order_.size() - 1);
    return steps_of(training_.options, training_.options.unfreeze.until * rank / last);
  }

  Training& training_;
  std::vector<int64_t> order_;  ///< blocks, as they begin
};

}  // namespace

void add_unfreeze(Schedules& schedules, Training& training) {
  if (training.options.unfreeze.until > 0) schedules.push_back(std::make_unique<UnfreezeSchedule>(training));
}

}  // namespace qat::train
