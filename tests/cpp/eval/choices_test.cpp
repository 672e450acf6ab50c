#include "qat/eval/choices.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"

namespace {

using qat::eval::ChoiceOptions;
using qat::eval::Continuation;
using qat::eval::log_likelihoods;
using qat::eval::Question;
using qat::eval::SplitModel;

constexpr int64_t kVocabulary = 29, kWidth = 6;

/// A causal model: the hidden state is the mean of the embeddings so far.
struct Toy {
  at::Tensor embedding = at::randn({kVocabulary, kWidth}) * 2, head = at::randn({kVocabulary, kWidth});
  std::vector<std::vector<int64_t>> calls = {};  ///< sizes of each call's tokens
  int64_t rows = 0;                              ///< hidden states whose logits were asked for

  at::Tensor hidden(const at::Tensor& tokens) const {
    const at::Tensor count = at::arange(1, tokens.size(1) + 1).unsqueeze(1);
    return at::cumsum(at::embedding(embedding, tokens), 1) / count;
  }
  SplitModel split() {
    return {[this](const at::Tensor& tokens) {
              REQUIRE_FALSE(c10::GradMode::is_enabled());
              calls.push_back(tokens.sizes().vec());
              return hidden(tokens);
            },
            [this](const at::Tensor& states) {
              rows += states.size(0);
              REQUIRE(states.size(0) <= 128);
              return states.matmul(head.t());
            }};
  }
  /// By the definition, one sequence at a time, sums in double.
  double expected(const Continuation& one) const {
    const at::Tensor tokens = at::tensor(one.tokens).unsqueeze(0);
    const at::Tensor logits = hidden(tokens)[0].matmul(head.t()).to(at::kDouble);
    double sum = 0;
    for (std::size_t t = one.context; t < one.tokens.size(); ++t) {
      const at::Tensor row = logits[static_cast<int64_t>(t) - 1];
      sum += (row[one.tokens[t]] - row.exp().sum().log()).item<double>();
    }
    return sum;
  }
};

std::vector<int64_t> ids(int64_t count, int64_t seed) {
  std::vector<int64_t> result;
  for (int64_t i = 0; i < count; ++i) result.push_back((seed * 7919 + i * i * 31 + i * 17) % kVocabulary);
  return result;
}

// Sums of up to 200 float32 log-probabilities of about 5: each is off by at most some 2^-22.
constexpr double kTolerance = 1e-4;

}  // namespace

TEST_CASE("log-likelihoods equal the definition whatever shares a batch") {
  at::manual_seed(0);
  Toy toy;
  std::vector<Continuation> items;
  for (int64_t i = 0; i < 20; ++i) items.push_back({ids(4 + 9 * i % 31, i), 1 + i % 3});
  items.push_back(
      {ids(200, 3), 1});  // more than one block of scored positions, and a row beyond batch_tokens
  items.push_back({ids(2, 5), 1});
  ChoiceOptions options;
  for (const int64_t batch_tokens : {1, 60, 100000}) {
    options.batch_tokens = batch_tokens;
    toy.calls.clear();
    const auto found = log_likelihoods(toy.split(), items, options);
    REQUIRE(found.size() == items.size());
    for (std::size_t i = 0; i < items.size(); ++i) {
      CAPTURE(i, batch_tokens);
      REQUIRE(found[i] == Approx(toy.expected(items[i])).margin(kTolerance));
    }
    for (const auto& size : toy.calls) REQUIRE((size[0] == 1 || size[0] * size[1] <= batch_tokens));
  }
  REQUIRE(toy.calls.size() == 1);
}

TEST_CASE("logits exist only where tokens are scored, and equal inputs are computed once") {
  Toy toy;
  std::vector<Continuation> items;
  for (int64_t last = 0; last < 4; ++last) {  // four one-token choices of one question
    items.push_back({ids(12, 1), 12});
    items.back().tokens.push_back(last);
  }
  items.push_back({ids(9, 2), 4});
  const auto found = log_likelihoods(toy.split(), items);
  REQUIRE(toy.calls == std::vector<std::vector<int64_t>>{{2, 12}});
  REQUIRE(toy.rows == 1 + 5);
  for (std::size_t i = 0; i < items.size(); ++i) {
    REQUIRE(found[i] == Approx(toy.expected(items[i])).margin(kTolerance));
  }
  // The same input with the border elsewhere.
  const std::vector<Continuation> borders{{ids(9, 2), 4}, {ids(9, 2), 7}, {ids(9, 2), 8}};
  toy.calls.clear();
  const auto sums = log_likelihoods(toy.split(), borders);
  REQUIRE(toy.calls == std::vector<std::vector<int64_t>>{{1, 8}});
  for (std::size_t i = 0; i < 3; ++i) {
    REQUIRE(sums[i] == Approx(toy.expected(borders[i])).margin(kTolerance));
  }
}

TEST_CASE("a model that only gives logits is scored alike") {
  Toy toy;
  const std::vector<Continuation> items{{ids(9, 2), 4}, {ids(5, 1), 1}};
  const auto whole =
      SplitModel::whole([&](const at::Tensor& tokens) { return toy.hidden(tokens).matmul(toy.head.t()); });
  const auto found = log_likelihoods(whole, items);
  const auto half = SplitModel::whole(
      [&](const at::Tensor& tokens) { return toy.hidden(tokens).matmul(toy.head.t()).to(at::kBFloat16); });
  const auto rounded = log_likelihoods(half, items);
  for (std::size_t i = 0; i < items.size(); ++i) {
    REQUIRE(found[i] == Approx(toy.expected(items[i])).margin(kTolerance));
    REQUIRE(rounded[i] == Approx(found[i]).epsilon(0.02));  // bfloat16 keeps 8 bits
    REQUIRE(rounded[i] != found[i]);
  }
}

TEST_CASE("a context that is too long loses its beginning") {
  Toy toy;
  const std::vector<int64_t> tokens = ids(20, 4);
  ChoiceOptions options;
  options.max_length = 8;
  const auto found = log_likelihoods(toy.split(), {{tokens, 16}}, options);
  const Continuation rest{{tokens.begin() + 11, tokens.end()}, 5};
  REQUIRE(toy.calls == std::vector<std::vector<int64_t>>{{1, 8}});
  REQUIRE(found[0] == Approx(toy.expected(rest)).margin(kTolerance));
  REQUIRE_NOTHROW(log_likelihoods(toy.split(), {{tokens, 12}}, options));
  REQUIRE_THROWS_WITH(
      log_likelihoods(toy.split(), {{tokens, 11}}, options),
      "eval::choices: continuations[0]: expected at most max_length = 8 scored tokens, got 9");
}

TEST_CASE("choices, accuracy and the accuracy per byte") {
  // Bigrams: after token 0 come 1, 2, 3 with probabilities 0.6, 0.3, 0.1, then always token 4.
  at::Tensor table = at::full({5, 5}, -100.0f);
  for (const auto& [token, p] : {std::pair{1, 0.6f}, {2, 0.3f}, {3, 0.1f}}) table[0][token] = std::log(p);
  for (int64_t token = 1; token < 5; ++token) table[token][4] = 0.0f;
  const auto model =
      SplitModel::whole([&](const at::Tensor& tokens) { return at::embedding(table, tokens); });
  const std::vector<Continuation> choices{{{4, 0, 3}, 2}, {{4, 0, 2, 4}, 2}, {{4, 0, 1}, 2}};
  // log 0.1 / 1 = -2.30, log 0.3 / 4 = -0.30, log 0.6 / 1 = -0.51 per byte
  const std::vector<int64_t> bytes{1, 4, 1};
  const auto score = qat::eval::score_choices(model, {{choices, bytes, 2}, {choices, bytes, 1}});
  REQUIRE(score.chosen == std::vector<int64_t>{2, 2});
  REQUIRE(score.chosen_per_byte == std::vector<int64_t>{1, 1});
  REQUIRE(score.accuracy == 0.5);
  REQUIRE(score.accuracy_norm == 0.5);
  REQUIRE(score.log_likelihoods[1][0] == Approx(std::log(0.1)).margin(1e-6));
  REQUIRE(score.log_likelihoods[1][1] == Approx(std::log(0.3)).margin(1e-6));
}

TEST_CASE("ties go to the first choice, and NaN never wins against a number") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto constant = [](float first) {
    return SplitModel::whole([first](const at::Tensor& tokens) {
      at::Tensor logits = at::zeros({tokens.size(0), tokens.size(1), 4});
      logits.masked_fill_((tokens == 3).unsqueeze(2), first);
      return logits;
    });
  };
  const Question same{{{{0, 1}, 1}, {{0, 2}, 1}}, {1, 1}, 0};
  REQUIRE(qat::eval::score_choices(constant(0), {same}).chosen == std::vector<int64_t>{0});
  const Question broken{{{{3, 1}, 1}, {{0, 2}, 1}}, {1, 1}, 0};
  REQUIRE(qat::eval::score_choices(constant(nan), {broken}).chosen == std::vector<int64_t>{1});
}

TEST_CASE("progress counts continuations") {
  Toy toy;
  std::vector<std::pair<int64_t, int64_t>> seen;
  ChoiceOptions options;
  options.batch_tokens = 16;
  options.progress = [&](int64_t done, int64_t total) { seen.emplace_back(done, total); };
  log_likelihoods(toy.split(), {{ids(9, 2), 4}, {ids(9, 3), 4}, {ids(9, 2), 2}, {ids(5, 1), 1}}, options);
  REQUIRE(seen == std::vector<std::pair<int64_t, int64_t>>{{3, 4}, {4, 4}});
}

TEST_CASE("bad questions are named") {
  Toy toy;
  const auto run = [&](std::vector<Continuation> items) { return log_likelihoods(toy.split(), items); };
  REQUIRE_THROWS_WITH(run({{{1, 2}, 1}, {{1, 2}, 2}}), Catch::Contains("continuations[1].context"));
  REQUIRE_THROWS_AS(run({{{1, 2}, 0}}), qat::ArgumentError);
  REQUIRE_THROWS_AS(run({{{1}, 1}}), qat::ArgumentError);
  REQUIRE_THROWS_AS(run({{{}, 1}}), qat::ArgumentError);
  REQUIRE_THROWS_WITH(run({{{1, -2, 3}, 1}}), Catch::Contains("got -2"));
  REQUIRE_THROWS_WITH(run({{{1, kVocabulary}, 1}}), Catch::Contains("[0, 29)"));
  const Question good{{{{0, 1}, 1}, {{0, 2}, 1}}, {1, 1}, 0};
  const auto ask = [&](auto change) {
    Question question = good;
    change(question);
    return qat::eval::score_choices(toy.split(), {good, question});
  };
  REQUIRE_THROWS_WITH(ask([](Question& q) { q.answer = 2; }), Catch::Contains("questions[1].answer"));
  REQUIRE_THROWS_WITH(ask([](Question& q) { q.bytes[1] = 0; }), Catch::Contains("questions[1].bytes"));
  REQUIRE_THROWS_WITH(ask([](Question& q) { q.bytes.pop_back(); }), Catch::Contains("questions[1].bytes"));
  REQUIRE_THROWS_WITH(ask([](Question& q) { q = {}; }), Catch::Contains("questions[1].choices"));
  REQUIRE_THROWS_AS(qat::eval::score_choices(toy.split(), {}), qat::ArgumentError);
  ChoiceOptions options;
  options.max_length = 0;
  REQUIRE_THROWS_WITH(log_likelihoods(toy.split(), {}, options), Catch::Contains("max_length"));
  const auto flat = SplitModel::whole([](const at::Tensor& tokens) { return tokens.to(at::kFloat); });
  REQUIRE_THROWS_WITH(log_likelihoods(flat, {{{1, 2}, 1}}),
                      Catch::Contains("model: expected float [1, 1, ...]"));
  const SplitModel no_head{[&](const at::Tensor& tokens) { return toy.hidden(tokens); },
                           [](const at::Tensor&) { return at::Tensor(); }};
  REQUIRE_THROWS_WITH(log_likelihoods(no_head, {{{1, 2}, 1}}), Catch::Contains("model head"));
}
