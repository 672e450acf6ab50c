#include "qat/eval/eval.hpp"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/randn.h>

#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"

namespace {

using qat::eval::compare;
using qat::eval::LogitsFunction;
using qat::eval::Score;

/// A bigram model: the logits of a position are the row of its token.
LogitsFunction bigram(const at::Tensor& table) {
  return [table](const at::Tensor& tokens) { return at::embedding(table, tokens); };
}

at::Tensor random_tokens(int64_t count, int64_t vocabulary, uint64_t seed) {
  at::Tensor tokens = at::empty({count}, at::kLong);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    tokens[i] = static_cast<int64_t>((seed >> 33) % static_cast<uint64_t>(vocabulary));
  }
  return tokens;
}

/// log p(token | row) in double, from the definition.
std::vector<double> log_softmax(const float* row, int64_t vocabulary) {
  double greatest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t v = 0; v < vocabulary; ++v) greatest = std::max(greatest, static_cast<double>(row[v]));
  for (int64_t v = 0; v < vocabulary; ++v) sum += std::exp(row[v] - greatest);
  std::vector<double> result;
  for (int64_t v = 0; v < vocabulary; ++v) result.push_back(row[v] - greatest - std::log(sum));
  return result;
}

struct Expected {
  double nll = 0, kl = 0, top1 = 0;
  int64_t count = 0;
};

/// Bigram scores by the definitions, position by position.
Expected closed_form(const at::Tensor& p_table, const at::Tensor& q_table, const at::Tensor& tokens,
                     int64_t window) {
  const int64_t vocabulary = p_table.size(1), n = tokens.size(0);
  Expected sums;
  for (int64_t i = 0; i + 1 < n; ++i) {
    if (i % window == window - 1) continue;
    const int64_t row = tokens[i].item<int64_t>(), next = tokens[i + 1].item<int64_t>();
    const auto p = log_softmax(p_table[row].data_ptr<float>(), vocabulary);
    const auto q = log_softmax(q_table[row].data_ptr<float>(), vocabulary);
    sums.nll -= q[next];
    for (int64_t v = 0; v < vocabulary; ++v) sums.kl += std::exp(p[v]) * (p[v] - q[v]);
    sums.top1 +=
        std::max_element(p.begin(), p.end()) - p.begin() == std::max_element(q.begin(), q.end()) - q.begin();
    ++sums.count;
  }
  sums.nll /= static_cast<double>(sums.count);
  sums.kl /= static_cast<double>(sums.count);
  sums.top1 /= static_cast<double>(sums.count);
  return sums;
}

// Scores use float32 log-probabilities (relative error 2^-24 of values up to about 15) and double sums.
constexpr double kTolerance = 2e-6;

}  // namespace

TEST_CASE("scores equal the definitions in double") {
  constexpr int64_t kVocabulary = 37;
  at::manual_seed(1);
  const at::Tensor p = at::randn({kVocabulary, kVocabulary}) * 2;
  const at::Tensor q = p + at::randn({kVocabulary, kVocabulary}) * 0.7;
  const at::Tensor tokens = random_tokens(203, kVocabulary, 7);  // a last window of 11
  qat::eval::Options options;
  options.window = 48;
  options.batch = 3;
  const auto scores = compare(bigram(p), {bigram(q), bigram(p)}, tokens, options);
  REQUIRE(scores.size() == 3);
  for (std::size_t i = 0; i < 3; ++i) {
    const Expected expected = closed_form(p, i == 1 ? q : p, tokens, options.window);
    CAPTURE(i);
    REQUIRE(scores[i].tokens == expected.count);
    REQUIRE(scores[i].nll == Approx(expected.nll).margin(kTolerance));
    REQUIRE(scores[i].kl == Approx(expected.kl).margin(kTolerance));
    REQUIRE(scores[i].top1 == Approx(expected.top1).margin(1e-12));
    REQUIRE(scores[i].perplexity() == std::exp(scores[i].nll));
  }
  REQUIRE(scores[1].kl > 0.05);
  REQUIRE(scores[1].top1 < 1);
  REQUIRE(scores[2].kl == 0);
}

TEST_CASE("window means weigh to the total") {
  at::manual_seed(4);
  const at::Tensor p = at::randn({9, 9}), q = p + at::randn({9, 9});
  qat::eval::Options options;
  options.window = 10;
  const at::Tensor tokens = random_tokens(36, 9, 3);
  const auto score = compare(bigram(p), {bigram(q)}, tokens, options)[1];
  REQUIRE(score.window_kl.size() == 4);
  const double kl =
      (9 * (score.window_kl[0] + score.window_kl[1] + score.window_kl[2]) + 5 * score.window_kl[3]) / 32;
  REQUIRE(score.kl == Approx(kl).epsilon(1e-12));
  const double nll =
      (9 * (score.window_nll[0] + score.window_nll[1] + score.window_nll[2]) + 5 * score.window_nll[3]) / 32;
  REQUIRE(score.nll == Approx(nll).epsilon(1e-12));
  REQUIRE(score.window_tokens == std::vector<int64_t>{9, 9, 9, 5});
  for (int64_t window = 0; window < 4; ++window) {
    const at::Tensor rows = tokens.slice(0, 10 * window, 10 * window + score.window_tokens[window]);
    const at::Tensor same = p.index_select(0, rows).argmax(1) == q.index_select(0, rows).argmax(1);
    REQUIRE(score.window_top1[window] == Approx(same.to(at::kDouble).mean().item<double>()));
  }
  REQUIRE((score.top1 > 0 && score.top1 < 1));
}

TEST_CASE("the batch size does not change the result, and each model is called once per batch") {
  const at::Tensor p = at::randn({11, 11}), q = at::randn({11, 11});
  const at::Tensor tokens = random_tokens(100, 11, 5);
  int calls = 0;
  const LogitsFunction counted = [&](const at::Tensor& input) {
    ++calls;
    REQUIRE_FALSE(c10::GradMode::is_enabled());
    return bigram(p)(input);
  };
  qat::eval::Options options;
  options.window = 20;
  options.batch = 1;
  const auto one = compare(counted, {bigram(q), bigram(q)}, tokens, options);
  REQUIRE(calls == 5);
  options.batch = 4;
  const auto four = compare(counted, {bigram(q), bigram(q)}, tokens, options);
  REQUIRE(calls == 7);
  REQUIRE(one[1].nll == four[1].nll);
  REQUIRE(one[1].window_kl == four[2].window_kl);
}

TEST_CASE("tokens that the reference rules out add nothing to the KL") {
  const float infinity = std::numeric_limits<float>::infinity();
  at::Tensor p = at::zeros({2, 4}), q = at::zeros({2, 4});
  p.select(1, 3).fill_(-infinity);
  q.select(1, 3).fill_(-infinity);
  q.select(1, 0).fill_(1.0f);
  const auto scores = compare(bigram(p), {bigram(q)}, at::ones({6}, at::kLong));
  const double log_sum = std::log(std::exp(1.0) + 2);  // of q's three live tokens
  REQUIRE(scores[1].kl == Approx(-std::log(3.0) - (1.0 / 3 - log_sum)).margin(kTolerance));
}

TEST_CASE("half-width logits are scored as the numbers they are") {
  const at::Tensor p = at::randn({8, 8}).to(at::kBFloat16), q = at::randn({8, 8}).to(at::kBFloat16);
  const at::Tensor tokens = random_tokens(64, 8, 2);
  const auto half = compare(bigram(p), {bigram(q)}, tokens);
  const auto full = compare(bigram(p.to(at::kFloat)), {bigram(q.to(at::kFloat))}, tokens);
  REQUIRE(half[1].kl == full[1].kl);
  REQUIRE(half[1].nll == full[1].nll);
}

TEST_CASE("progress reports and stops") {
  const at::Tensor p = at::randn({5, 5});
  std::vector<int64_t> seen;
  qat::eval::Options options;
  options.window = 10;
  options.batch = 2;
  options.progress = [&](int64_t done, int64_t total) {
    REQUIRE(total == 5 * 9);
    seen.push_back(done);
    return seen.size() < 2;
  };
  const auto scores = compare(bigram(p), {}, random_tokens(50, 5, 1), options);
  REQUIRE(seen == std::vector<int64_t>{18, 36});
  REQUIRE(scores[0].tokens == 36);
}

TEST_CASE("bad arguments are named") {
  const at::Tensor p = at::randn({5, 5});
  const auto run = [&](const at::Tensor& tokens) { return compare(bigram(p), {}, tokens); };
  REQUIRE_THROWS_WITH(run(at::zeros({1}, at::kLong)),
                      "eval::compare: tokens: expected at least 2 tokens, got 1");
  REQUIRE_THROWS_WITH(run(at::zeros({4}, at::kInt)), "eval::compare: tokens: expected int64[n], got Int[4]");
  REQUIRE_THROWS_AS(run(at::Tensor()), qat::ArgumentError);
  at::Tensor negative = at::zeros({4}, at::kLong);
  negative[2] = -1;
  REQUIRE_THROWS_WITH(run(negative), Catch::Contains("tokens[2]") && Catch::Contains("got -1"));
  const LogitsFunction narrow = [](const at::Tensor& t) { return at::zeros({t.size(0), t.size(1), 3}); };
  REQUIRE_THROWS_WITH(compare(narrow, {}, at::arange(4)),
                      Catch::Contains("tokens[3]: expected an id in [0, 3), got 3"));
  REQUIRE_THROWS_WITH(compare(bigram(p), {narrow}, at::arange(4)),
                      "eval::compare: candidates[0]: expected float logits [1, 4, 5], got Float[1, 4, 3]");
  const LogitsFunction whole = [](const at::Tensor& t) { return t.unsqueeze(2); };
  REQUIRE_THROWS_WITH(compare(whole, {}, at::arange(4)), Catch::Contains("reference"));
  qat::eval::Options options;
  options.window = 1;
  REQUIRE_THROWS_WITH(compare(bigram(p), {}, at::arange(4), options), Catch::Contains("window"));
}

TEST_CASE("the share removed is 1 for a perfect repair and NaN without a loss to repair") {
  REQUIRE(qat::eval::share_removed(0.3, 0.15) == 0.5);
  REQUIRE(qat::eval::share_removed(0.3, 0.0) == 1);
  REQUIRE(qat::eval::share_removed(0.2, 0.3) == Approx(-0.5));
  REQUIRE(std::isnan(qat::eval::share_removed(0.0, 0.1)));
  REQUIRE(std::isnan(qat::eval::share_removed(-0.1, 0.1)));
}
