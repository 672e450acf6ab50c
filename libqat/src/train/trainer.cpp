#include "qat/train/trainer.hpp"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <optional>
#include <utility>

#include "qat/core/error.hpp"
#include "qat/train/compute.hpp"
#include "train/adamw.hpp"
#include "train/code_monitor.hpp"
#include "train/evaluation_mode.hpp"
#include "train/parameters.hpp"
#include "train/permutation.hpp"
#include "train/run_folder.hpp"

namespace qat::train {
namespace {

using Clock = std::chrono::steady_clock;

void require_callable(const LanguageModel& function, const char* name, const char* why) {
  if (function) return;
  throw ArgumentError(std::string("Trainer: ") + name + ": expected a function (" + why + "), got none");
}

/// The cache must answer what the run will ask.
void check_cache(const TeacherCache& cache, const TokenData& data, const Options& options) {
  const auto check = [](bool ok, const std::string& expected, const std::string& got) {
    if (!ok) throw ArgumentError("Trainer: teacher cache: expected " + expected + ", got " + got);
  };
  const CacheKey& key = cache.key();
  check(options.objective.needs_teacher(), "an objective that compares with a teacher", "none");
  check(key.text == data.fingerprint(), "answers to this text", "another's");
  check(key.length == options.sequence_length,
        "windows of " + std::to_string(options.sequence_length) + " tokens", std::to_string(key.length));
  check(key.temperature == options.objective.temperature,
        "temperature " + std::to_string(options.objective.temperature), std::to_string(key.temperature));
  const CachePlan plan = plan_teacher_cache(data, options, key.top_k, key.teacher);
  for (const int64_t window : plan.windows) {
    check(cache.holds(window), "the answer to window " + std::to_string(window), "none");
  }
}

/// Random layers draw from a generator that depends on the run's seed and the step only.
void seed_generator(at::Device device, int64_t seed, int64_t step) {
  at::Generator generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_current_seed(mix(mix(static_cast<std::uint64_t>(seed)) ^ static_cast<std::uint64_t>(step)));
}

}  // namespace

struct Trainer::Impl {
  Impl(PreparedModel& prepared, LanguageModel student_model, LanguageModel teacher_model,
       std::optional<TeacherCache> answers, TokenData text, Options settings, std::string run_folder);

  std::vector<StateTensor> state() const;
  double accumulate_gradients(int64_t at_step);
  TeacherAnswer teach(const std::vector<int64_t>& windows, const at::Tensor& tokens) const;
  at::Tensor loss_of(const std::vector<int64_t>& windows, const Objective& objective);
  void check_finite(int64_t at_step, const char* what, double value) const;
  StepReport train_one_step(int64_t at_step);
  std::vector<eval::Score> evaluate();
  void complete(StepReport& report, Clock::time_point start, int64_t first);
  bool due(int64_t every) const noexcept { return every > 0 && step % every == 0; }
  void save() { folder.save(state(), step, identity); }

  PreparedModel& model;
  LanguageModel student, teacher;
  std::optional<TeacherCache> cache;
  TokenData data;
  Options options;
  TrainedParameters parameters;
  at::Device device;
  at::ScalarType compute = at::kFloat;
  AdamW optimizer;
  std::optional<CodeMonitor> monitor;
  RunIdentity identity;
  RunFolder folder;
  at::Tensor evaluation_tokens;
  eval::Options evaluation_options;
  std::function<bool(const StepReport&)> progress;
  int64_t step = 0;
  bool begun = false;  ///< the run folder is ours
  std::atomic<bool> stop{false};
  static_assert(std::atomic<bool>::is_always_lock_free, "request_stop is called from signal handlers");
};

namespace {

Options validated(Options options) {
  validate(options);
  return options;
}

}  // namespace

Trainer::Impl::Impl(PreparedModel& prepared, LanguageModel student_model, LanguageModel teacher_model,
                    std::optional<TeacherCache> answers, TokenData text, Options settings,
                    std::string run_folder)
    : model(prepared),
      student(std::move(student_model)),
      teacher(std::move(teacher_model)),
      cache(std::move(answers)),
      data(std::move(text)),
      options(validated(std::move(settings))),
      parameters(model.module(), options.frozen),
      device(parameters.trained().front().value.device()),
      optimizer(parameters.values(), options),
      folder(std::move(run_folder)) {
  require_callable(student, "student", "tokens -> logits");
  data.batch(0, 1, options.sequence_length, 0);  // the text holds a sequence
  if (cache) {
    check_cache(*cache, data, options);
  } else if (options.objective.needs_teacher()) {
    require_callable(teacher, "teacher", "the objective compares with one");
  }
  compute = compute_dtype(options.compute_dtype, device);
  options.compute_dtype =
      compute == at::kBFloat16 ? "bfloat16" : "float32";  // what a resumed run must repeat
  identity = {options, model.policy().to_json(), data.fingerprint()};
  if (cache) {
    identity.teacher_top_k = cache->key().top_k;
    identity.teacher = cache->key().teacher;
  }
  if (options.telemetry_every > 0) monitor.emplace(trained_weights(model));
}

std::vector<StateTensor> Trainer::Impl::state() const {
  std::vector<StateTensor> tensors;
  for (std::size_t i = 0; i < parameters.trained().size(); ++i) {
    const NamedParameter& parameter = parameters.trained()[i];
    tensors.push_back({"latent/" + parameter.name, parameter.value});
    tensors.push_back({"exp_avg/" + parameter.name, optimizer.first_moments()[i]});
    tensors.push_back({"exp_avg_sq/" + parameter.name, optimizer.second_moments()[i]});
  }
  for (const auto& buffer : model.module().named_buffers()) {
    tensors.push_back({"buffer/" + buffer.key(), buffer.value()});
  }
  if (monitor) {
    for (std::size_t i = 0; i < monitor->codes().size(); ++i) {
      tensors.push_back({"codes/" + monitor->weights()[i].name, monitor->codes()[i]});
    }
  }
  return tensors;
}

TeacherAnswer Trainer::Impl::teach(const std::vector<int64_t>& windows, const at::Tensor& tokens) const {
  if (!options.objective.needs_teacher()) return {};
  const c10::NoGradGuard no_grad;
  const ComputeScope scope(compute, device);
  if (cache) {
    TeacherAnswer answer = cache->answer(windows);
    return {answer.ids.to(device), answer.log_p.to(device)};
  }
  if (teacher.in_halves()) return {teacher.hidden(tokens), teacher.head()};
  return teacher.logits(tokens);
}

/// The loss of one micro-batch.
at::Tensor Trainer::Impl::loss_of(const std::vector<int64_t>& windows, const Objective& objective) {
  const at::Tensor tokens = data.read(windows, options.sequence_length).to(device);
  const TeacherAnswer expected = teach(windows, tokens);
  const auto quantized = model.quantized();
  const ComputeScope scope(compute, device);
  if (!student.in_halves()) return objective_loss(student.logits(tokens), expected, tokens, objective);
  return head_loss(student.hidden(tokens), student.head(), expected, tokens, objective, options.loss_chunk);
}

/// Leaves the mean gradient of the step's micro-batches in the parameters and returns the mean loss.
double Trainer::Impl::accumulate_gradients(int64_t at_step) {
  // Of one micro-batch.
  const Objective share = options.objective.times(1 / static_cast<double>(options.accumulate));
  double total = 0;
  for (int64_t micro = 0; micro < options.accumulate; ++micro) {
    const int64_t index = (at_step - 1) * options.accumulate + micro;
    const auto windows = data.windows(index, options.batch_size, options.sequence_length, options.seed);
    const at::Tensor loss = loss_of(windows, share);
    const double value = loss.item<double>();
    check_finite(at_step, "loss", value);
    total += value;
    loss.backward();
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
  optimizer.clear_gradients();
  StepReport report;
  report.step = at_step;
  report.steps = options.steps;
  report.loss = accumulate_gradients(at_step);
  report.learning_rate = learning_rate_at(options, at_step);
  report.gradient_norm = optimizer.gradient_norm();
  check_finite(at_step, "gradient", report.gradient_norm);
  optimizer.update(at_step, report.learning_rate, report.gradient_norm);
  optimizer.clear_gradients();
  step = at_step;
  return report;
}

/// Empty when a stop was requested before it was complete.
std::vector<eval::Score> Trainer::Impl::evaluate() {
  const EvaluationMode mode(model.module());
  const eval::LogitsFunction ours = [this](const at::Tensor& tokens) {
    const auto quantized = model.quantized();
    const ComputeScope scope(compute, device);
    return student(tokens.to(device));
  };
  const eval::LogitsFunction reference = [this](const at::Tensor& tokens) {
    const ComputeScope scope(compute, device);
    return teacher(tokens.to(device));
  };
  eval::Options settings = evaluation_options;
  settings.progress = [this](int64_t done, int64_t total) {
    const bool go_on = !evaluation_options.progress || evaluation_options.progress(done, total);
    return go_on && !stop.load();
  };
  auto scores = teacher ? eval::compare(reference, {ours}, evaluation_tokens, settings)
                        : eval::compare(ours, {}, evaluation_tokens, settings);
  if (stop.load()) scores.clear();
  return scores;
}

/// What is measured besides the step itself. first: the step before this process's first.
void Trainer::Impl::complete(StepReport& report, Clock::time_point start, int64_t first) {
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const auto done = static_cast<double>(step - first);
  const auto tokens = static_cast<double>(options.batch_size * options.sequence_length * options.accumulate);
  report.tokens_per_second = done * tokens / seconds;
  report.seconds_left = static_cast<double>(options.steps - step) * seconds / done;
  if (monitor && due(options.telemetry_every)) {
    const CodeMonitor::Measurement measured = monitor->measure();
    report.flip_rate = measured.flip_rate;
    report.distance_to_grid = measured.distance_to_grid;
  }
  if (evaluation_tokens.defined() && due(options.eval_every)) report.evaluation = evaluate();
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
  impl_->step = impl_->folder.resume(impl_->state(), impl_->identity);
  impl_->begun = true;
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
  if (!impl.begun) impl.folder.begin(impl.identity);
  impl.begun = true;
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
  return Outcome::kFinished;
}

void Trainer::request_stop() noexcept {
  impl_->stop.store(true);
}

int64_t Trainer::step() const noexcept {
  return impl_->step;
}

}  // namespace qat::train
