#include <algorithm>
#include <cmath>

#include "train/schedule.hpp"

namespace qat::train {
namespace {

void set_blend(PreparedModel& model, double blend) {
  for (const auto& quantizer : model.quantizers()) {
    if (quantizer) quantizer->set_blend(blend);
  }
}

/// No rounding at first, then more and more of it.
class Blend : public Schedule {
 public:
  explicit Blend(Training& training)
      : model_(training.model),
        delay_(steps_of(training.options, training.options.delay)),
        rise_(steps_of(training.options, training.options.blend)) {}
  ~Blend() override { set_blend(model_, 1); }

  void begin_step(int64_t step) override {
    const auto past = static_cast<double>(step - delay_);
    const double share = rise_ > 0 ? past / static_cast<double>(rise_) : past;
    set_blend(model_, std::clamp(share, 0.0, 1.0));
  }

 private:
  PreparedModel& model_;
  int64_t delay_, rise_;
};

}  // namespace

int64_t steps_of(const Options& options, double share) noexcept {
  return std::llround(share * static_cast<double>(options.steps));
}

void add_blend(Schedules& schedules, Training& training) {
  if (training.options.delay == 0 && training.options.blend == 0) return;
  schedules.push_back(std::make_unique<Blend>(training));
}

FullBlend::FullBlend(PreparedModel& model) : model_(model) {
  for (const auto& quantizer : model.quantizers()) before_.push_back(quantizer ? quantizer->blend() : 1);
  set_blend(model, 1);
}

FullBlend::~FullBlend() {
  for (std::size_t i = 0; i < before_.size(); ++i) {
    if (model_.quantizers()[i]) model_.quantizers()[i]->set_blend(before_[i]);
  }
}

}  // namespace qat::train
