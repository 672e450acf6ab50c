#include "qat/train/trainer.hpp"

#include <ATen/Context.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <optional>
#include <utility>

#include "qat/core/error.hpp"
#include "train/average.hpp"
#include "train/batch_loss.hpp"
#include "train/diagnosis.hpp"
#include "train/evaluation_mode.hpp"
#include "train/permutation.hpp"
#include "train/probe.hpp"
#include "train/run_folder.hpp"
#include "train/schedule.hpp"
#include "train/training.hpp"

namespace qat::train {
namespace {

using Clock = std::chrono::steady_clock;

/// Random layers draw from a generator that depends on the run's seed and the step only.
void seed_generator(at::Device device, int64_t seed, int64_t step) {
  at::Generator generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_current_seed(mix(mix(static_cast<std::uint64_t>(seed)) ^ static_cast<std::uint64_t>(step)));
}

Options validated(Options options) {
  validate(options);
  return options;
}

}  // namespace

struct Trainer::Impl {
  Impl(PreparedModel& prepared, LanguageModel student, LanguageModel teacher,
       std::optional<TeacherCache> answers, TokenData text, const Options& settings, std::string run_folder);

  std::vector<StateTensor> state() const;
  void resume();
  double accumulate_gradients(int64_t at_step);
  void check_finite(int64_t at_step, const char* what, double value) const;
  StepReport train_one_step(int64_t at_step);
  std::vector<eval::Score> evaluate();
  void measure(StepReport& report);
  void complete(StepReport& report, Clock::time_point start, int64_t first);
  void begin();
  void finish();
  bool due(int64_t every) const noexcept { return every > 0 && step % every == 0; }
  void save() { folder.save(state(), step, identity); }

  PreparedModel& model;
  Training training;
  const Options& options;
  at::Device device;
  BatchLoss loss;
  Schedules schedules;
  Average* average = nullptr;  ///< one of `schedules`, or none
  Probe probe;
  RunIdentity identity;
  RunFolder folder;
  at::Tensor evaluation_tokens;
  eval::Options evaluation_options;
  std::function<bool(const StepReport&)> progress;
  int64_t step = 0;
  bool begun = false;     ///< the run folder is ours
  bool averaged = false;  ///< the parameters are the averages
  std::atomic<bool> stop{false};
  static_assert(std::atomic<bool>::is_always_lock_free, "request_stop is called from signal handlers");
};

Trainer::Impl::Impl(PreparedModel& prepared, LanguageModel student, LanguageModel teacher,
                    std::optional<TeacherCache> answers, TokenData text, const Options& settings,
                    std::string run_folder)
    : model(prepared),
      training(prepared, validated(settings)),
      options(training.options),
      device(training.parameters.trained().front().value.device()),
      loss(prepared, std::move(student), std::move(teacher), std::move(answers), std::move(text), options,
           device),
      probe(loss, options),
      identity{options, model.policy().to_json(), loss.data().fingerprint()},
      folder(std::move(run_folder)) {
  // What a resumed run must repeat.
  identity.options.compute_dtype = loss.compute() == at::kBFloat16 ? "bfloat16" : "float32";
  if (const auto& cache = loss.cache()) {
    identity.teacher_top_k = cache->key().top_k;
    identity.teacher = cache->key().teacher;
  }
  add_blend(schedules, training);
  add_progressive(schedules, training);
  add_unfreeze(schedules, training);
  add_oscillation(schedules, training);
  if (options.ema > 0) {
    auto owned = std::make_unique<Average>(training);
    average = owned.get();
    schedules.push_back(std::move(owned));
  }
  add_prox(schedules, training);
}

std::vector<StateTensor> Trainer::Impl::state() const {
  std::vector<StateTensor> tensors;
  training.add_state(tensors);
  for (const auto& schedule : schedules) schedule->add_state(tensors);
  probe.add_state(tensors);
  return tensors;
}

void Trainer::Impl::resume() {
  // Which tensors the state has depends on the step.
  const int64_t saved = folder.saved_step(identity);
  for (const auto& schedule : schedules) schedule->begin_step(std::max<int64_t>(saved, 1));
  step = folder.resume(state(), identity);
  begun = true;
  averaged = false;
}

/// Leaves the mean gradient of the step's micro-batches in the parameters and returns the mean loss.
double Trainer::Impl::accumulate_gradients(int64_t at_step) {
  // Of one micro-batch.
  const Objective share = options.objective.times(1 / static_cast<double>(options.accumulate));
  double total = 0;
  for (int64_t micro = 0; micro < options.accumulate; ++micro) {
    const int64_t index = (at_step - 1) * options.accumulate + micro;
    const auto windows =
        loss.data().windows(index, options.batch_size, options.sequence_length, options.seed);
    const at::Tensor part = loss(windows, share);
    const double value = part.item<double>();
    check_finite(at_step, "loss", value);
    total += value;
    part.backward();
  }
  return total;
}

void Trainer::Impl::check_finite(int64_t at_step, const char* what, double value) const {
  if (std::isfinite(value)) return;
  throw NumericError("Trainer: step " + std::to_string(at_step) + ": " + what +
                     ": expected a finite number, got " + (std::isnan(value) ? "nan" : "inf") +
                     "; the weights are those of step " + std::to_string(step) +
                     ". A lower learning_rate, a clip_norm or compute_dtype float32 may help");
}

StepReport Trainer::Impl::train_one_step(int64_t at_step) {
  seed_generator(device, options.seed, at_step);
  training.clear_gradients();
  for (const auto& schedule : schedules) schedule->begin_step(at_step);
  StepReport report;
  report.step = at_step;
  report.steps = options.steps;
  report.loss = accumulate_gradients(at_step);
  for (const auto& schedule : schedules) schedule->before_update(at_step);
  report.learning_rate = learning_rate_at(options, at_step);
  report.gradient_norm = training.gradient_norm();
  check_finite(at_step, "gradient", report.gradient_norm);
  training.update(at_step, report.gradient_norm);
  training.clear_gradients();
  for (const auto& schedule : schedules) schedule->after_update(at_step);
  probe.see_gradient(at_step, report.gradient_norm);
  step = at_step;
  return report;
}

/// Empty when a stop was requested before it was complete.
std::vector<eval::Score> Trainer::Impl::evaluate() {
  eval::Options settings = evaluation_options;
  settings.progress = [this](int64_t done, int64_t total) {
    const bool go_on = !evaluation_options.progress || evaluation_options.progress(done, total);
    return go_on && !stop.load();
  };
  auto scores = loss.evaluate(evaluation_tokens, settings);
  if (stop.load()) scores.clear();
  return scores;
}

/// What is measured of the model as it would ship.
void Trainer::Impl::measure(StepReport& report) {
  const bool telemetry = due(options.telemetry_every);
  const bool evaluation = evaluation_tokens.defined() && due(options.eval_every);
  if (telemetry && training.monitor) {
    const CodeMonitor::Measurement codes = training.monitor->measure();
    probe.see_codes(codes);
    report.flip_rate = codes.flip_rate;
    report.oscillation = codes.oscillation;
    report.clip_rate = codes.clip_rate;
    report.scale_drift = codes.scale_drift;
    report.distance_to_grid = codes.distance_to_grid;
    report.dead_codes = codes.dead_codes;
  }
  if (!evaluation && !(telemetry && probe.active())) return;
  const EvaluationMode mode(model.module());
  const FullBlend blend(model);
  const AverageScope stand_in(average);
  if (telemetry && probe.active()) {
    probe.measure();
    report.probe_kl = probe.last();
    report.probe_kl_start = probe.start();
  }
  if (evaluation) report.evaluation = evaluate();
}

/// What is reported besides the step itself. first: the step before this process's first.
void Trainer::Impl::complete(StepReport& report, Clock::time_point start, int64_t first) {
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const auto done = static_cast<double>(step - first);
  const auto tokens = static_cast<double>(options.batch_size * options.sequence_length * options.accumulate);
  report.tokens_per_second = done * tokens / seconds;
  report.seconds_left = static_cast<double>(options.steps - step) * seconds / done;
  measure(report);
}

void Trainer::Impl::begin() {
  if (!begun) folder.begin(identity);
  begun = true;
  if (step > 0 || !probe.active() || probe.start() >= 0) return;
  const EvaluationMode mode(model.module());
  probe.measure();
}

/// The run is over: what ships takes the parameters' place.
void Trainer::Impl::finish() {
  if (average && !averaged) average->swap();
  averaged = true;
}

Trainer::Trainer(PreparedModel& model, LanguageModel student, LanguageModel teacher, TokenData data,
                 Options options, std::string run_folder)
    : impl_(std::make_unique<Impl>(model, std::move(student), std::move(teacher), std::nullopt,
                                   std::move(data), std::move(options), std::move(run_folder))) {}

Trainer::Trainer(PreparedModel& model, LanguageModel student, TeacherCache teacher, TokenData data,
                 Options options, std::string run_folder)
    : impl_(std::make_unique<Impl>(model, std::move(student), LanguageModel(), std::move(teacher),
                                   std::move(data), std::move(options), std::move(run_folder))) {}

Trainer::~Trainer() = default;

void Trainer::resume() {
  impl_->resume();
}

void Trainer::set_evaluation(at::Tensor tokens, eval::Options options) {
  impl_->evaluation_tokens = std::move(tokens);
  impl_->evaluation_options = std::move(options);
}

void Trainer::set_progress(std::function<bool(const StepReport&)> progress) {
  impl_->progress = std::move(progress);
}

Outcome Trainer::run() {
  Impl& impl = *impl_;
  impl.begin();
  const int64_t first = impl.step;
  const Clock::time_point start = Clock::now();
  while (impl.step < impl.options.steps) {
    StepReport report = impl.train_one_step(impl.step + 1);
    impl.complete(report, start, first);
    impl.folder.log(report);
    if (impl.progress && !impl.progress(report)) impl.stop = true;
    const bool last = impl.step == impl.options.steps, stopped = impl.stop.exchange(false);
    if (last || stopped || impl.due(impl.options.save_every)) impl.save();
    if (stopped && !last) return Outcome::kInterrupted;
  }
  impl.finish();
  return Outcome::kFinished;
}

void Trainer::request_stop() noexcept {
  impl_->stop.store(true);
}

int64_t Trainer::step() const noexcept {
  return impl_->step;
}

std::vector<std::string> Trainer::warnings() const {
  const Impl& impl = *impl_;
  if (impl.training.weights.empty()) return {};  // nothing was rounded, so nothing was to be won back
  RunFacts facts = impl.probe.facts();
  const Options& options = impl.options;
  facts.tokens = static_cast<double>(impl.step * options.accumulate * options.batch_size) *
                 static_cast<double>(options.sequence_length);
  facts.epochs = facts.tokens / static_cast<double>(impl.loss.data().size());
  return diagnose(facts);
}

}  // namespace qat::train
