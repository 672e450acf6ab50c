#include "qat/train/teacher_cache.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <utility>

#include "qat/core/error.hpp"
#include "qat/io/mapped_file.hpp"
#include "qat/train/compute.hpp"
#include "train/cache_format.hpp"
#include "train/cache_writer.hpp"
#include "train/top_k.hpp"

namespace qat::train {
namespace {

using Clock = std::chrono::steady_clock;

/// The first failure of an answer to be a distribution, as a window of the batch, or -1.
int64_t first_broken(const WindowAnswer& answer) {
  // Log-probabilities of -inf are legal; NaN is not, and neither is a window without any mass.
  const at::Tensor mass = answer.log_p.exp().sum(-1);
  const at::Tensor broken = (mass > 0.5).logical_not_().any(1);
  for (int64_t i = 0; i < broken.size(0); ++i) {
    if (broken[i].item<bool>()) return i;
  }
  return -1;
}

/// Answers windows of the text with a live teacher.
class Scribe {
 public:
  Scribe(const LanguageModel& teacher, const TokenData& data, const CacheKey& key, const Options& options)
      : teacher_(teacher), data_(data), key_(key), compute_(compute_dtype(options.compute_dtype)) {}

  void answer(const std::vector<int64_t>& windows, CacheWriter& writer) const {
    const WindowAnswer answers = top_outcomes(ask(data_.read(windows, key_.length)), key_);
    if (const int64_t broken = first_broken(answers); broken >= 0) {
      throw NumericError("TeacherCache::build: window " +
                         std::to_string(windows[static_cast<std::size_t>(broken)]) +
                         ": expected probabilities, got logits that are not finite");
    }
    for (std::size_t i = 0; i < windows.size(); ++i) {
      const auto b = static_cast<int64_t>(i);
      writer.add(windows[i], {answers.ids[b], answers.log_p[b]});
    }
  }

 private:
  TeacherAnswer ask(const at::Tensor& tokens) const {
    const ComputeScope scope(compute_);
    TeacherAnswer answer;
    if (teacher_.in_halves()) {
      answer = {teacher_.hidden(tokens), teacher_.head()};
    } else {
      answer = teacher_.logits(tokens);
    }
    check(answer, tokens);
    return answer;
  }

  void check(const TeacherAnswer& answer, const at::Tensor& tokens) const {
    const int64_t vocabulary = answer.hidden.defined() ? answer.head.weight.size(0) : answer.logits.size(-1);
    const at::Tensor& rows = answer.hidden.defined() ? answer.hidden : answer.logits;
    if (vocabulary == key_.vocabulary && rows.dim() == 3 && rows.sizes().slice(0, 2) == tokens.sizes())
      return;
    throw ArgumentError(
        "TeacherCache::build: teacher: expected answers to [B, T] tokens over a vocabulary of " +
        std::to_string(key_.vocabulary) + ", got one of " + std::to_string(vocabulary));
  }

  const LanguageModel& teacher_;
  const TokenData& data_;
  const CacheKey& key_;
  at::ScalarType compute_;
};

CacheProgress progress_of(int64_t done, int64_t before, const CachePlan& plan, Clock::time_point start) {
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const auto computed = static_cast<double>(done - before);
  const auto total = static_cast<int64_t>(plan.windows.size());
  return {done, total, computed * static_cast<double>(plan.key.length) / seconds,
          static_cast<double>(total - done) * seconds / computed};
}

}  // namespace

CachePlan plan_teacher_cache(const TokenData& data, const Options& options, int64_t top_k,
                             std::uint64_t teacher) {
  validate(options);
  CachePlan plan{{teacher, data.fingerprint(), data.vocabulary(), options.sequence_length, top_k,
                  options.objective.temperature},
                 {}};
  const CacheLayout checked(plan.key);
  const int64_t count = data.size() / options.sequence_length;
  std::vector<bool> read(static_cast<std::size_t>(count));
  int64_t left = count;
  const int64_t batches = options.steps * options.accumulate + (options.telemetry_every > 0 ? 1 : 0);
  for (int64_t index = 0; index < batches && left > 0; ++index) {  // the last one is the probe
    for (const int64_t window :
         data.windows(index, options.batch_size, options.sequence_length, options.seed)) {
      if (!read[static_cast<std::size_t>(window)]) --left;
      read[static_cast<std::size_t>(window)] = true;
    }
  }
  if (count == 0) data.windows(0, 1, options.sequence_length, 0);  // says what is wrong
  for (int64_t window = 0; window < count; ++window) {
    if (read[static_cast<std::size_t>(window)]) plan.windows.push_back(window);
  }
  return plan;
}

int64_t CachePlan::bytes() const {
  return static_cast<int64_t>(kCacheHeaderBytes + windows.size() * CacheLayout(key).bytes);
}

struct TeacherCache::Storage {
  Storage(const std::string& path, const CacheKey& wanted) : key(wanted), layout(wanted), file(path) {
    check_header(path, file.bytes(), key);
  }

  CacheKey key;
  CacheLayout layout;
  io::MappedFile file;
  CacheIndex index;
};

TeacherCache::TeacherCache(std::shared_ptr<const Storage> storage) : storage_(std::move(storage)) {}

int64_t TeacherCache::missing(const std::string& path, const CachePlan& plan) {
  if (!std::filesystem::exists(path)) return static_cast<int64_t>(plan.windows.size());
  const Storage storage(path, plan.key);
  const CacheIndex index = index_cache(storage.layout, storage.file.bytes(), /*verify=*/true);
  return std::count_if(plan.windows.begin(), plan.windows.end(),
                       [&](int64_t window) { return !index.slots.contains(window); });
}

bool TeacherCache::build(const std::string& path, const CachePlan& plan, const LanguageModel& teacher,
                         const TokenData& data, const Options& options,
                         const std::function<bool(const CacheProgress&)>& progress) {
  const c10::NoGradGuard no_grad;
  if (!teacher) throw ArgumentError("TeacherCache::build: teacher: expected a model, got none");
  CacheWriter writer(path, plan.key);
  std::vector<int64_t> left;
  for (const int64_t window : plan.windows) {
    if (!writer.holds(window)) left.push_back(window);
  }
  const auto total = static_cast<int64_t>(plan.windows.size());
  const int64_t before = total - static_cast<int64_t>(left.size());
  const Scribe scribe(teacher, data, plan.key, options);
  const Clock::time_point start = Clock::now();
  bool go_on = true;
  for (auto at = left.begin(); at != left.end() && go_on;) {
    const auto end = at + std::min<std::ptrdiff_t>(options.batch_size, left.end() - at);
    scribe.answer({at, end}, writer);
    at = end;
    if (progress) go_on = progress(progress_of(total - (left.end() - at), before, plan, start));
  }
  writer.sync();
  return std::all_of(left.begin(), left.end(), [&](int64_t window) { return writer.holds(window); });
}

TeacherCache TeacherCache::open(const std::string& path, const CachePlan& plan) {
  auto storage = std::make_shared<Storage>(path, plan.key);
  storage->index = index_cache(storage->layout, storage->file.bytes(), /*verify=*/false);
  if (storage->index.torn > 0) {
    throw FileError("TeacherCache: " + path + ": expected whole records of " +
                    std::to_string(storage->layout.bytes) + " bytes, got " +
                    std::to_string(storage->index.torn) +
                    " bytes of another: its build was interrupted, or the file was cut; build it again");
  }
  TeacherCache cache(std::move(storage));
  const auto lacking = std::count_if(plan.windows.begin(), plan.windows.end(),
                                     [&](int64_t window) { return !cache.holds(window); });
  if (lacking > 0) {
    throw FileError("TeacherCache: " + path + ": expected the answers to " +
                    std::to_string(plan.windows.size()) + " windows, got all but " + std::to_string(lacking) +
                    " of them: build it first");
  }
  return cache;
}

const CacheKey& TeacherCache::key() const noexcept {
  return storage_->key;
}

bool TeacherCache::holds(int64_t window) const noexcept {
  return storage_->index.slots.contains(window);
}

TeacherAnswer TeacherCache::answer(const std::vector<int64_t>& windows) const {
  const CacheLayout& layout = storage_->layout;
  const auto count = static_cast<int64_t>(windows.size());
  TeacherAnswer answer(at::empty({count, layout.positions, layout.top_k}, at::kLong),
                       at::empty({count, layout.positions, layout.top_k + 1}, at::kFloat));
  for (int64_t b = 0; b < count; ++b) {
    const int64_t window = windows[static_cast<std::size_t>(b)];
    const auto fail = [&](const std::string& got) {
      throw FileError("TeacherCache: " + storage_->file.path().string() + ": window " +
                      std::to_string(window) + ": expected an answer, got " + got + ": build it again");
    };
    const auto entry = storage_->index.slots.find(window);
    if (entry == storage_->index.slots.end()) fail("none");
    const auto record = cache_slot(layout, storage_->file.bytes(), entry->second);
    if (!record_is_whole(layout, record)) fail("a damaged record");
    if (!read_record(layout, record, {answer.ids[b], answer.log_p[b]})) fail("numbers that are no answer");
  }
  return answer;
}

}  // namespace qat::train
