#include "qat/eval/eval.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/gather.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <utility>

#include "qat/core/error.hpp"

namespace qat::eval {
namespace {

/// Rows of logits scored at a time. 16 rows of a 50k vocabulary are 3 MB in float32, so that the passes over
/// a block stay in a core's cache and no float32 copy of all logits exists.
constexpr int64_t kRowBlock = 16;

[[noreturn]] void fail(const std::string& subject, const std::string& expected, const std::string& got) {
  throw ArgumentError("eval::compare: " + subject + ": expected " + expected + ", got " + got);
}

std::string to_string(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << sizes;
  return text.str();
}

void check_options(const Options& options) {
  if (options.window < 2) fail("window", "at least 2 tokens", std::to_string(options.window));
  if (options.batch < 1) fail("batch", "at least 1 window", std::to_string(options.batch));
}

void check_tokens(const at::Tensor& tokens) {
  if (!tokens.defined() || tokens.dim() != 1 || tokens.scalar_type() != at::kLong) {
    fail("tokens", "int64[n]",
         tokens.defined() ? std::string(c10::toString(tokens.scalar_type())) + to_string(tokens.sizes())
                          : "nothing");
  }
  if (tokens.size(0) < 2) fail("tokens", "at least 2 tokens", std::to_string(tokens.size(0)));
}

/// Logits of one model on tokens [B, T]: float of any width, [B, T, V]; V < 0 accepts any vocabulary.
at::Tensor call(const LogitsFunction& model, const at::Tensor& tokens, int64_t vocabulary,
                const std::string& name) {
  at::Tensor logits = model(tokens);
  const auto expected = [&] {
    return "float logits [" + std::to_string(tokens.size(0)) + ", " + std::to_string(tokens.size(1)) + ", " +
           (vocabulary < 0 ? "V" : std::to_string(vocabulary)) + "]";
  };
  if (!logits.defined()) fail(name, expected(), "nothing");
  const bool shape = logits.dim() == 3 && logits.size(0) == tokens.size(0) &&
                     logits.size(1) == tokens.size(1) && logits.size(2) > 0 &&
                     (vocabulary < 0 || logits.size(2) == vocabulary);
  if (!shape || !logits.is_floating_point()) {
    fail(name, expected(), std::string(c10::toString(logits.scalar_type())) + to_string(logits.sizes()));
  }
  return logits.detach();
}

/// Per predicted position, in double: int64[B, T] tokens give [B, T - 1] each.
struct Positions {
  at::Tensor nll, kl, same;
};

/// float32 log-probabilities of rows [first, last) of logits [B, T, V], where row r is position
/// (r / (T - 1), r % (T - 1)): the last position of a window predicts nothing.
at::Tensor log_probabilities(const at::Tensor& logits, int64_t batch, int64_t first, int64_t last) {
  return at::_log_softmax(logits.select(0, batch).slice(0, first, last).to(at::kFloat), -1, false);
}

/// Scores positions [first, last) of window `batch`. `reference` is undefined when the candidate is the
/// reference itself.
void score_block(const at::Tensor& reference, const at::Tensor& candidate, const at::Tensor& targets,
                 int64_t batch, int64_t first, int64_t last, Positions& out) {
  const at::Tensor log_q = log_probabilities(candidate, batch, first, last);
  const at::Tensor target = targets.select(0, batch).slice(0, first, last).unsqueeze(1);
  out.nll.select(0, batch).slice(0, first, last).copy_(-log_q.gather(1, target).squeeze(1));
  if (!reference.defined()) return;
  const at::Tensor log_p = log_probabilities(reference, batch, first, last);
  // A token the reference rules out (log p = -inf) contributes 0, whatever the candidate says.
  const at::Tensor difference = (log_p - log_q).masked_fill_(log_p.isneginf(), 0);
  out.kl.select(0, batch).slice(0, first, last).copy_((log_p.exp() * difference).sum(1, false, at::kDouble));
  out.same.select(0, batch).slice(0, first, last).copy_(log_p.argmax(1) == log_q.argmax(1));
}

Positions score_positions(const at::Tensor& reference, const at::Tensor& candidate,
                          const at::Tensor& tokens) {
  const int64_t batches = tokens.size(0), positions = tokens.size(1) - 1;
  const at::Tensor targets = tokens.slice(1, 1).to(candidate.device());
  const at::TensorOptions f64 = at::TensorOptions(at::kDouble);
  Positions out{at::zeros({batches, positions}, f64), at::zeros({batches, positions}, f64),
                at::ones({batches, positions}, f64)};
  const int64_t blocks = (positions + kRowBlock - 1) / kRowBlock;
  const auto work = [&](int64_t begin, int64_t end) {
    const c10::NoGradGuard no_grad;  // thread-local, and this may be a worker thread
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % blocks * kRowBlock;
      score_block(reference, candidate, targets, block / blocks, first,
                  std::min(first + kRowBlock, positions), out);
    }
  };
  if (candidate.is_cpu()) {
    at::parallel_for(0, batches * blocks, 1, work);
  } else {
    work(0, batches * blocks);
  }
  return out;
}

/// Adds one batch's windows; the means hold sums until `finish`.
void add(Score& score, const Positions& positions) {
  const int64_t count = positions.nll.size(1);
  for (int64_t window = 0; window < positions.nll.size(0); ++window) {
    const double nll = positions.nll.select(0, window).sum().item<double>();
    const double kl = positions.kl.select(0, window).sum().item<double>();
    const double same = positions.same.select(0, window).sum().item<double>();
    score.nll += nll;
    score.kl += kl;
    score.top1 += same;
    score.window_nll.push_back(nll / static_cast<double>(count));
    score.window_kl.push_back(kl / static_cast<double>(count));
    score.window_top1.push_back(same / static_cast<double>(count));
    score.window_tokens.push_back(count);
    score.tokens += count;
  }
}

void finish(Score& score) {
  const auto tokens = static_cast<double>(score.tokens);
  score.nll /= tokens;
  score.kl /= tokens;
  score.top1 /= tokens;
}

/// tokens as batches [B, T] of whole windows, then the shorter rest if it still predicts something.
std::vector<at::Tensor> cut(const at::Tensor& tokens, const Options& options) {
  std::vector<at::Tensor> batches;
  const int64_t windows = tokens.size(0) / options.window;
  for (int64_t first = 0; first < windows; first += options.batch) {
    const int64_t count = std::min(options.batch, windows - first);
    batches.push_back(tokens.slice(0, first * options.window, (first + count) * options.window)
                          .view({count, options.window}));
  }
  const at::Tensor rest = tokens.slice(0, windows * options.window);
  if (rest.size(0) >= 2) batches.push_back(rest.unsqueeze(0));
  return batches;
}

void check_ids(const at::Tensor& tokens, int64_t vocabulary) {
  const at::Tensor bad = (tokens < 0).logical_or_(tokens >= vocabulary);
  if (!bad.any().item<bool>()) return;
  const int64_t where = bad.to(at::kByte).argmax().item<int64_t>();
  fail("tokens[" + std::to_string(where) + "]", "an id in [0, " + std::to_string(vocabulary) + ")",
       std::to_string(tokens[where].item<int64_t>()));
}

}  // namespace

double Score::perplexity() const {
  return std::exp(nll);
}

std::vector<Score> compare(const LogitsFunction& reference, const std::vector<LogitsFunction>& candidates,
                           const at::Tensor& tokens, const Options& options) {
  check_options(options);
  check_tokens(tokens);
  check_ids(tokens, std::numeric_limits<int64_t>::max());
  const c10::NoGradGuard no_grad;
  const at::Tensor text = tokens.contiguous();
  const std::vector<at::Tensor> batches = cut(text, options);
  int64_t total = 0, done = 0, vocabulary = -1;
  for (const at::Tensor& batch : batches) total += batch.size(0) * (batch.size(1) - 1);

  std::vector<Score> scores(1 + candidates.size());
  for (const at::Tensor& batch : batches) {
    const at::Tensor expected = call(reference, batch, vocabulary, "reference");
    if (vocabulary < 0) check_ids(text, vocabulary = expected.size(2));
    add(scores[0], score_positions({}, expected, batch));
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      const at::Tensor logits =
          call(candidates[i], batch, vocabulary, "candidates[" + std::to_string(i) + "]");
      add(scores[i + 1], score_positions(expected, logits, batch));
    }
    done += batch.size(0) * (batch.size(1) - 1);
    if (options.progress && !options.progress(done, total)) break;
  }
  for (Score& score : scores) finish(score);
  return scores;
}

double share_removed(double quantized, double trained) noexcept {
  if (!(quantized > 0)) return std::numeric_limits<double>::quiet_NaN();
  return 1 - trained / quantized;
}

}  // namespace qat::eval
