#include "train/batch_loss.hpp"

#include <c10/core/GradMode.h>

#include <string>
#include <utility>

#include "qat/core/error.hpp"
#include "qat/train/compute.hpp"

namespace qat::train {
namespace {

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

}  // namespace

BatchLoss::BatchLoss(PreparedModel& model, LanguageModel student, LanguageModel teacher,
                     std::optional<TeacherCache> cache, TokenData data, const Options& options,
                     at::Device device)
    : model_(model),
      student_(std::move(student)),
      teacher_(std::move(teacher)),
      cache_(std::move(cache)),
      data_(std::move(data)),
      options_(options),
      device_(device),
      compute_(compute_dtype(options.compute_dtype, device)) {
  require_callable(student_, "student", "tokens -> logits");
  data_.batch(0, 1, options_.sequence_length, 0);  // the text holds a sequence
  if (cache_) {
    check_cache(*cache_, data_, options_);
  } else if (options_.objective.needs_teacher()) {
    require_callable(teacher_, "teacher", "the objective compares with one");
  }
}

at::Tensor BatchLoss::read(const std::vector<int64_t>& windows) const {
  return data_.read(windows, options_.sequence_length).to(device_);
}

TeacherAnswer BatchLoss::teach(const std::vector<int64_t>& windows) const {
  if (cache_) {
    const TeacherAnswer answer = cache_->answer(windows);
    return {answer.ids.to(device_), answer.log_p.to(device_)};
  }
  const c10::NoGradGuard no_grad;
  const ComputeScope scope(compute_, device_);
  const at::Tensor tokens = read(windows);
  if (teacher_.in_halves()) return {teacher_.hidden(tokens), teacher_.head()};
  return teacher_.logits(tokens);
}

at::Tensor BatchLoss::loss(const at::Tensor& tokens, const TeacherAnswer& answer,
                           const Objective& objective) {
  const auto quantized = model_.quantized();
  const ComputeScope scope(compute_, device_);
  if (!student_.in_halves()) return objective_loss(student_.logits(tokens), answer, tokens, objective);
  return head_loss(student_.hidden(tokens), student_.head(), answer, tokens, objective, options_.loss_chunk);
}

at::Tensor BatchLoss::operator()(const std::vector<int64_t>& windows, const Objective& objective) {
  const TeacherAnswer answer = objective.needs_teacher() ? teach(windows) : TeacherAnswer();
  return loss(read(windows), answer, objective);
}

double BatchLoss::divergence(const std::vector<int64_t>& windows, const TeacherAnswer& answer) {
  const c10::NoGradGuard no_grad;
  const double t = cache_ ? cache_->key().temperature : 1;
  return loss(read(windows), answer, {1 / (t * t), 0, t}).item<double>();
}

std::vector<eval::Score> BatchLoss::evaluate(const at::Tensor& tokens, const eval::Options& settings) {
  const eval::LogitsFunction ours = [this](const at::Tensor& batch) {
    const auto quantized = model_.quantized();
    const ComputeScope scope(compute_, device_);
    return student_(batch.to(device_));
  };
  const eval::LogitsFunction reference = [this](const at::Tensor& batch) {
    const ComputeScope scope(compute_, device_);
    return teacher_(batch.to(device_));
  };
  return teacher_ ? eval::compare(reference, {ours}, tokens, settings)
                  : eval::compare(ours, {}, tokens, settings);
}

}  // namespace qat::train
