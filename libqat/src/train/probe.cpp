#include "train/probe.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>

#include <algorithm>

namespace qat::train {
namespace {

constexpr int64_t kStart = 0, kLast = 1, kFirstGradient = 2, kLastGradient = 3, kFlips = 4, kClipped = 5,
                  kDrift = 6, kPlaces = 7;

}  // namespace

std::vector<int64_t> probe_windows(const TokenData& data, const Options& options) {
  return data.windows(options.steps * options.accumulate, options.batch_size, options.sequence_length,
                      options.seed);
}

Probe::Probe(BatchLoss& loss, const Options& options)
    : loss_(loss), memory_(at::full({kPlaces}, -1.0, at::TensorOptions(at::kDouble))) {
  if (options.telemetry_every > 0 && options.objective.needs_teacher()) {
    windows_ = probe_windows(loss.data(), options);
  }
}

void Probe::measure() {
  const TeacherAnswer answer = answer_ ? *answer_ : loss_.teach(windows_);
  if (!answer.logits.defined()) answer_ = answer;
  const double kl = loss_.divergence(windows_, answer);
  if (start() < 0) memory_[kStart] = kl;
  memory_[kLast] = kl;
}

void Probe::see_gradient(int64_t step, double norm) {
  if (step == 1) memory_[kFirstGradient] = norm;
  memory_[kLastGradient] = norm;
}

void Probe::see_codes(const CodeMonitor::Measurement& codes) {
  memory_[kFlips] = std::max(at(kFlips), codes.flip_rate);
  memory_[kClipped] = codes.clip_rate;
  memory_[kDrift] = codes.scale_drift;
}

double Probe::at(int64_t place) const {
  return memory_[place].item<double>();
}

double Probe::start() const {
  return at(kStart);
}

double Probe::last() const {
  return at(kLast);
}

RunFacts Probe::facts() const {
  RunFacts facts;
  facts.probe_start = start();
  facts.probe_last = last();
  facts.gradient_start = at(kFirstGradient);
  facts.gradient_last = at(kLastGradient);
  facts.flip_rate = at(kFlips);
  facts.clip_rate = at(kClipped);
  facts.scale_drift = at(kDrift);
  return facts;
}

void Probe::add_state(std::vector<StateTensor>& tensors) const {
  if (active()) tensors.push_back({"probe", memory_});
}

}  // namespace qat::train
