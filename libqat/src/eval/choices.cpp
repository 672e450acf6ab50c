#include "qat/eval/choices.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <utility>

#include "qat/core/error.hpp"

namespace qat::eval {
namespace {

/// Rows whose logits exist at a time: 26 MB in float32 for a vocabulary of 50k.
constexpr int64_t kRowBlock = 128;

[[noreturn]] void fail(const std::string& subject, const std::string& expected, const std::string& got) {
  throw ArgumentError("eval::choices: " + subject + ": expected " + expected + ", got " + got);
}

std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "nothing";
  std::ostringstream text;
  text << c10::toString(tensor.scalar_type()) << tensor.sizes();
  return text.str();
}

/// A continuation without what the model cannot take: `tokens` has at most max_length + 1 of them.
struct Sequence {
  const int64_t* tokens;
  int64_t size, context, index;

  int64_t input() const noexcept { return size - 1; }
};

bool same_input(const Sequence& a, const Sequence& b) {
  return a.input() == b.input() && std::equal(a.tokens, a.tokens + a.input(), b.tokens);
}

/// Longest first, so that the rows of a batch have similar lengths; equal inputs side by side.
bool before(const Sequence& a, const Sequence& b) {
  if (a.size != b.size) return a.size > b.size;
  const auto [left, right] = std::mismatch(a.tokens, a.tokens + a.input(), b.tokens);
  return left == a.tokens + a.input() ? a.index < b.index : *left < *right;
}

Sequence checked(const Continuation& one, int64_t index, int64_t max_length) {
  const std::string subject = "continuations[" + std::to_string(index) + "]";
  const auto size = static_cast<int64_t>(one.tokens.size());
  if (one.context < 1 || one.context >= size) {
    fail(subject + ".context", "1 to " + std::to_string(size - 1) + " of " + std::to_string(size) + " tokens",
         std::to_string(one.context));
  }
  const auto negative = std::find_if(one.tokens.begin(), one.tokens.end(), [](int64_t id) { return id < 0; });
  if (negative != one.tokens.end()) fail(subject, "ids of 0 or more", std::to_string(*negative));
  const int64_t dropped = std::max<int64_t>(0, size - 1 - max_length);
  if (one.context - dropped < 1) {
    fail(subject, "at most max_length = " + std::to_string(max_length) + " scored tokens",
         std::to_string(size - one.context));
  }
  return {one.tokens.data() + dropped, size - dropped, one.context - dropped, index};
}

/// Sequences of one call: rows of equal input, one after the other.
struct Batch {
  std::vector<std::vector<Sequence>> rows;

  int64_t length() const { return rows.front().front().input(); }
};

std::vector<Batch> batches_of(std::vector<Sequence> sequences, int64_t batch_tokens) {
  std::sort(sequences.begin(), sequences.end(), before);
  std::vector<Batch> batches;
  for (const Sequence& sequence : sequences) {
    if (!batches.empty() && same_input(batches.back().rows.back().front(), sequence)) {
      batches.back().rows.back().push_back(sequence);
      continue;
    }
    const bool full =
        batches.empty() ||
        static_cast<int64_t>(batches.back().rows.size() + 1) * batches.back().length() > batch_tokens;
    if (full) batches.emplace_back();
    batches.back().rows.push_back({sequence});
  }
  return batches;
}

at::Tensor input_of(const Batch& batch) {
  const auto count = static_cast<int64_t>(batch.rows.size()), length = batch.length();
  at::Tensor tokens = at::zeros({count, length}, at::kLong);
  int64_t* out = tokens.mutable_data_ptr<int64_t>();
  for (const auto& row : batch.rows) {
    std::copy_n(row.front().tokens, row.front().input(), out);
    out += length;
  }
  return tokens;
}

/// One scored token: the position that predicts it, and whose it is.
struct Target {
  int64_t position, token, index;
};

/// Positions number the hidden states [B * T]. Sorted by position.
std::vector<Target> targets_of(const Batch& batch) {
  std::vector<Target> targets;
  for (std::size_t row = 0; row < batch.rows.size(); ++row) {
    for (const Sequence& sequence : batch.rows[row]) {
      for (int64_t t = sequence.context; t < sequence.size; ++t) {
        const auto position = static_cast<int64_t>(row) * batch.length() + t - 1;
        targets.push_back({position, sequence.tokens[t], sequence.index});
      }
    }
  }
  std::stable_sort(targets.begin(), targets.end(),
                   [](const Target& a, const Target& b) { return a.position < b.position; });
  return targets;
}

at::Tensor call_hidden(const SplitModel& model, const at::Tensor& tokens) {
  at::Tensor hidden = model.hidden(tokens);
  const bool good = hidden.defined() && hidden.dim() == 3 && hidden.is_floating_point() &&
                    hidden.size(0) == tokens.size(0) && hidden.size(1) == tokens.size(1);
  if (!good) {
    fail("model",
         "float [" + std::to_string(tokens.size(0)) + ", " + std::to_string(tokens.size(1)) + ", ...]",
         describe(hidden));
  }
  return hidden.detach().flatten(0, 1);
}

/// float32 log-probabilities [n, V] of some positions.
at::Tensor log_probabilities(const SplitModel& model, const at::Tensor& hidden,
                             const std::vector<int64_t>& positions) {
  const at::Tensor rows = hidden.index_select(0, at::tensor(positions, at::kLong).to(hidden.device()));
  const at::Tensor logits = model.head(rows);
  const bool good = logits.defined() && logits.dim() == 2 && logits.is_floating_point() &&
                    logits.size(0) == rows.size(0) && logits.size(1) > 0;
  if (!good) fail("model head", "float [" + std::to_string(rows.size(0)) + ", V]", describe(logits));
  return at::_log_softmax(logits.detach().to(at::kFloat), -1, false).cpu();
}

/// Adds the log-probabilities of targets [first, last), which have at most kRowBlock positions.
void add_block(const SplitModel& model, const at::Tensor& hidden, const Target* first, const Target* last,
               std::vector<double>& sums) {
  std::vector<int64_t> positions;
  for (const Target* target = first; target != last; ++target) {
    if (positions.empty() || positions.back() != target->position) positions.push_back(target->position);
  }
  const at::Tensor log_p = log_probabilities(model, hidden, positions);
  const float* values = log_p.const_data_ptr<float>();
  const int64_t vocabulary = log_p.size(1);
  int64_t row = 0;
  for (const Target* target = first; target != last; ++target) {
    if (positions[row] != target->position) ++row;
    if (target->token >= vocabulary) {
      fail("continuations[" + std::to_string(target->index) + "]",
           "ids in [0, " + std::to_string(vocabulary) + ")", std::to_string(target->token));
    }
    sums[target->index] += static_cast<double>(values[row * vocabulary + target->token]);
  }
}

void add_batch(const SplitModel& model, const Batch& batch, std::vector<double>& sums) {
  const std::vector<Target> targets = targets_of(batch);
  const at::Tensor hidden = call_hidden(model, input_of(batch));
  auto first = targets.begin();
  while (first != targets.end()) {
    auto last = first;
    for (int64_t rows = 0; last != targets.end(); ++last) {
      if ((last == first || last->position != (last - 1)->position) && ++rows > kRowBlock) break;
    }
    add_block(model, hidden, &*first, &*first + (last - first), sums);
    first = last;
  }
}

void check(const ChoiceOptions& options) {
  if (options.max_length < 1) fail("max_length", "at least 1", std::to_string(options.max_length));
  if (options.batch_tokens < 1) fail("batch_tokens", "at least 1", std::to_string(options.batch_tokens));
}

void check(const Question& question, std::size_t index) {
  const std::string subject = "questions[" + std::to_string(index) + "]";
  const std::size_t count = question.choices.size();
  if (count == 0) fail(subject + ".choices", "at least 1", "0");
  if (question.bytes.size() != count) {
    fail(subject + ".bytes", std::to_string(count) + " of them", std::to_string(question.bytes.size()));
  }
  for (const int64_t bytes : question.bytes) {
    if (bytes < 1) fail(subject + ".bytes", "at least 1", std::to_string(bytes));
  }
  if (question.answer < 0 || question.answer >= static_cast<int64_t>(count)) {
    fail(subject + ".answer", "0 to " + std::to_string(count - 1), std::to_string(question.answer));
  }
}

int64_t greatest(const std::vector<double>& values) {
  const auto less = [](double a, double b) { return a < b || (std::isnan(a) && !std::isnan(b)); };
  return std::max_element(values.begin(), values.end(), less) - values.begin();
}

}  // namespace

SplitModel SplitModel::whole(LogitsFunction logits) {
  return {std::move(logits), [](const at::Tensor& rows) { return rows; }};
}

std::vector<double> log_likelihoods(const SplitModel& model, const std::vector<Continuation>& continuations,
                                    const ChoiceOptions& options) {
  check(options);
  const c10::NoGradGuard no_grad;
  std::vector<Sequence> sequences;
  for (std::size_t i = 0; i < continuations.size(); ++i) {
    sequences.push_back(checked(continuations[i], static_cast<int64_t>(i), options.max_length));
  }
  std::vector<double> sums(continuations.size(), 0.0);
  int64_t done = 0;
  for (const Batch& batch : batches_of(std::move(sequences), options.batch_tokens)) {
    add_batch(model, batch, sums);
    for (const auto& row : batch.rows) done += static_cast<int64_t>(row.size());
    if (options.progress) options.progress(done, static_cast<int64_t>(sums.size()));
  }
  return sums;
}

ChoiceScore score_choices(const SplitModel& model, const std::vector<Question>& questions,
                          const ChoiceOptions& options) {
  if (questions.empty()) fail("questions", "at least 1", "0");
  std::vector<Continuation> continuations;
  for (std::size_t i = 0; i < questions.size(); ++i) {
    check(questions[i], i);
    continuations.insert(continuations.end(), questions[i].choices.begin(), questions[i].choices.end());
  }
  const std::vector<double> all = log_likelihoods(model, continuations, options);
  ChoiceScore score;
  auto next = all.begin();
  for (const Question& question : questions) {
    std::vector<double> values(next, next + static_cast<std::ptrdiff_t>(question.choices.size()));
    next += static_cast<std::ptrdiff_t>(values.size());
    score.chosen.push_back(greatest(values));
    std::vector<double> per_byte = values;
    for (std::size_t i = 0; i < values.size(); ++i) per_byte[i] /= static_cast<double>(question.bytes[i]);
    score.chosen_per_byte.push_back(greatest(per_byte));
    score.accuracy += score.chosen.back() == question.answer;
    score.accuracy_norm += score.chosen_per_byte.back() == question.answer;
    score.log_likelihoods.push_back(std::move(values));
  }
  score.accuracy /= static_cast<double>(questions.size());
  score.accuracy_norm /= static_cast<double>(questions.size());
  return score;
}

}  // namespace qat::eval
