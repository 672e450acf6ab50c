#include "qat/eval/bootstrap.hpp"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>

#include "catch.hpp"
#include "qat/core/error.hpp"

namespace {

using qat::eval::BootstrapOptions;
using qat::eval::Interval;
using qat::eval::resampled_means;
using qat::eval::Score;
using Series = std::vector<double>;

/// A score with the given window means; the totals are their weighted means.
Score score_of(Series nll, Series kl, std::vector<int64_t> tokens) {
  Score score;
  score.window_top1 = Series(nll.size(), 0.5);
  for (std::size_t i = 0; i < nll.size(); ++i) {
    score.tokens += tokens[i];
    score.nll += nll[i] * tokens[i];
    score.kl += kl[i] * tokens[i];
  }
  score.nll /= score.tokens;
  score.kl /= score.tokens;
  score.top1 = 0.5;
  score.window_nll = std::move(nll);
  score.window_kl = std::move(kl);
  score.window_tokens = std::move(tokens);
  return score;
}

bool is_nan(const Interval& interval) {
  return std::isnan(interval.low) && std::isnan(interval.high);
}

}  // namespace

TEST_CASE("draws are SplitMix64's published outputs") {
  // The first five outputs of SplitMix64 started at 1234567 are 6457827717110365317, 3203168211198807973,
  // 9817491932198370423, 4593380528125082431, 16408922859458223821: as shares of 2^64 they are 0.350, 0.174,
  // 0.532, 0.249, 0.890, so the items drawn from five are 1, 0, 2, 1, 4.
  BootstrapOptions options;
  options.resamples = 1;
  options.seed = 1234567;
  const Series values{1, 10, 100, 1000, 10000};
  REQUIRE(resampled_means({values}, {}, options)[0][0] == Approx((10 + 1 + 100 + 10 + 10000) / 5.0));
  const Series weights{1, 2, 3, 4, 5};
  const double weighted = 2 * 10 + 1 * 1 + 3 * 100 + 2 * 10 + 5 * 10000;
  REQUIRE(resampled_means({values}, weights, options)[0][0] == Approx(weighted / (2 + 1 + 3 + 2 + 5)));
}

TEST_CASE("the spread of resampled means is the closed form") {
  // Var of the mean of n draws with replacement = population variance / n, here (0 + 1 + 4 + 9) / 4 - 1.5^2.
  const Series values{0, 1, 2, 3};
  BootstrapOptions options;
  options.resamples = 100000;
  const Series means = resampled_means({values}, {}, options)[0];
  const double n = static_cast<double>(means.size());
  const double mean = std::accumulate(means.begin(), means.end(), 0.0) / n;
  double variance = 0;
  for (const double x : means) variance += (x - mean) * (x - mean) / n;
  // Standard errors over 100000 resamples: 0.56 / 316 = 0.0018 and 0.31 * sqrt(2) / 316 = 0.0014; 4 of each.
  REQUIRE(mean == Approx(1.5).margin(0.008));
  REQUIRE(variance == Approx(1.25 / 4).margin(0.006));
}

TEST_CASE("the interval of a large sample is the normal one") {
  Series values;
  for (int i = 0; i < 400; ++i) values.push_back(std::sin(1.7 * i) + (i % 5));
  double mean = 0, variance = 0;
  for (const double x : values) mean += x / 400;
  for (const double x : values) variance += (x - mean) * (x - mean) / 400;
  const double half = 1.959964 * std::sqrt(variance / 400);
  const Interval interval = qat::eval::mean_interval(values);
  // 10000 resamples place a 2.5 % quantile to sqrt(.025 * .975 / 1e4) / 0.0584 = 2.7 % of a standard error,
  // 1.4 % of `half`; four of these, and a little skewness.
  REQUIRE(interval.low == Approx(mean - half).margin(0.06 * half));
  REQUIRE(interval.high == Approx(mean + half).margin(0.06 * half));
}

TEST_CASE("percentiles interpolate between order statistics") {
  const Interval quarter = qat::eval::percentile_interval({5, 1, 4, 2, 3}, 0.5);
  REQUIRE(quarter.low == 2);
  REQUIRE(quarter.high == 4);
  const Interval most = qat::eval::percentile_interval({0, 10}, 0.9);
  REQUIRE(most.low == Approx(0.5));
  REQUIRE(most.high == Approx(9.5));
  REQUIRE(is_nan(qat::eval::percentile_interval({})));
  REQUIRE(is_nan(qat::eval::percentile_interval({1, std::nan(""), 2})));
}

TEST_CASE("the same seed gives the same numbers on any number of threads, another seed others") {
  Series values;
  for (int i = 0; i < 50; ++i) values.push_back(std::cos(i));
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = resampled_means({values}, {});
  at::set_num_threads(3);
  REQUIRE(resampled_means({values}, {}) == one);
  at::set_num_threads(threads);
  BootstrapOptions options;
  options.seed = 1;
  REQUIRE(resampled_means({values}, {}, options) != one);
}

TEST_CASE("series are paired: a constant quotient has no spread") {
  const std::vector<int64_t> tokens{255, 255, 100};
  const Score reference = score_of({2.0, 3.0, 2.5}, {0, 0, 0}, tokens);
  const Score quantized = score_of({2.4, 3.2, 2.8}, {0.4, 0.2, 0.3}, tokens);
  const Score trained = score_of({2.1, 3.05, 2.575}, {0.1, 0.05, 0.075}, tokens);
  const auto shares = qat::eval::removed(reference, quantized, trained);
  // Each window's costs stand 1 to 4, so every resample does; 1e-12 for the rounding of sums in double.
  for (const double x : {shares.kl, shares.nll, shares.kl_interval.low, shares.kl_interval.high,
                         shares.nll_interval.low, shares.nll_interval.high}) {
    REQUIRE(x == Approx(0.75).margin(1e-12));
  }
}

TEST_CASE("scores of models, and what training removed") {
  at::manual_seed(3);
  const at::Tensor table = at::randn({11, 11}), noise = at::randn({11, 11});
  const auto model = [&](double scale) {
    return [logits = table + scale * noise](const at::Tensor& ids) { return at::embedding(logits, ids); };
  };
  const auto teacher = model(0), rounded = model(0.5), trained = model(0.25);
  const at::Tensor tokens = at::randint(11, {4000}, at::kLong);
  const auto scores = qat::eval::compare(teacher, {rounded, trained}, tokens);
  const auto shares = qat::eval::removed(scores[0], scores[1], scores[2]);
  std::printf("KL removed: %.3f (%.3f to %.3f)\n", shares.kl, shares.kl_interval.low,
              shares.kl_interval.high);
  // The KL of a small change of logits goes with its square: a quarter remains.
  REQUIRE(shares.kl == Approx(0.75).margin(0.03));
  REQUIRE(shares.kl_interval.low < shares.kl);
  REQUIRE(shares.kl_interval.high > shares.kl);
}

TEST_CASE("a share of a cost that may be nothing has no interval") {
  const std::vector<int64_t> tokens{10, 10, 10, 10};
  const Score reference = score_of({2, 2, 2, 2}, {0, 0, 0, 0}, tokens);
  const Score quantized = score_of({2.5, 2.5, 2.5, 1.9}, {0.1, 0.1, 0.1, 0.1}, tokens);
  const Score trained = score_of({2.2, 2.2, 2.2, 2.2}, {0.05, 0.05, 0.05, 0.05}, tokens);
  const auto shares = qat::eval::removed(reference, quantized, trained);
  REQUIRE(shares.nll == Approx(1 - 0.2 / 0.35));
  REQUIRE(is_nan(shares.nll_interval));  // a resample of the last window alone has a negative cost
  REQUIRE_FALSE(is_nan(shares.kl_interval));
}

TEST_CASE("intervals of scores hold the score and weigh windows by their tokens") {
  const std::vector<int64_t> tokens{255, 255, 255, 1};
  const auto a = score_of({2.0, 2.2, 2.4, 50.0}, {0.1, 0.3, 0.2, 9.0}, tokens);
  const auto both = qat::eval::intervals({a, a});
  REQUIRE(both.size() == 2);
  REQUIRE(both[0].nll.low == both[1].nll.low);
  REQUIRE(both[0].nll.low <= a.nll);
  REQUIRE(both[0].nll.high >= a.nll);
  // The last window is drawn at least twice in a quarter of the resamples and alone in 1 of 256 (less than
  // the 2.5 % beyond the interval): the unweighted mean is then above 26, the weighted at most (255 * 2.4 +
  // 150) / 258.
  REQUIRE(qat::eval::mean_interval(a.window_nll).high > 26);
  REQUIRE(both[0].nll.high < 3);
  REQUIRE(both[0].perplexity.low == std::exp(both[0].nll.low));
  REQUIRE(both[0].top1.low == Approx(0.5));
  REQUIRE(qat::eval::intervals({}).empty());
}

TEST_CASE("a single window has no interval") {
  const Score a = score_of({2.0}, {0.1}, {255});
  REQUIRE(is_nan(qat::eval::intervals({a})[0].nll));
  REQUIRE(is_nan(qat::eval::removed(a, a, a).kl_interval));
  REQUIRE(is_nan(qat::eval::mean_interval({1.0})));
}

TEST_CASE("a candidate that rules out a true token has an infinite mean and no interval") {
  const double infinity = std::numeric_limits<double>::infinity();
  const auto score = score_of({2.0, infinity, 3.0}, {0.1, infinity, 0.2}, {5, 5, 5});
  const Interval nll = qat::eval::intervals({score})[0].nll;
  REQUIRE(std::isfinite(nll.low));
  REQUIRE(std::isinf(nll.high));
}

TEST_CASE("bad arguments of the bootstrap are named") {
  BootstrapOptions options;
  REQUIRE_THROWS_WITH(resampled_means({{}}, {}), Catch::Contains("items") && Catch::Contains("got 0"));
  REQUIRE_THROWS_WITH(resampled_means({{1, 2}, {1}}, {}),
                      Catch::Contains("series: expected 2 values, got 1"));
  REQUIRE_THROWS_WITH(resampled_means({{1, 2}}, {1}), Catch::Contains("weights"));
  REQUIRE_THROWS_WITH(resampled_means({{1, 2}}, {1, 0}), Catch::Contains("weights[1]"));
  REQUIRE_THROWS_WITH(resampled_means({{1, 2}}, {1, std::nan("")}), Catch::Contains("weights[1]"));
  options.resamples = 0;
  REQUIRE_THROWS_WITH(resampled_means({{1, 2}}, {}, options), Catch::Contains("resamples"));
  options.resamples = 1;
  options.level = 1;
  REQUIRE_THROWS_WITH(resampled_means({{1, 2}}, {}, options), Catch::Contains("level"));
  const Score a = score_of({2.0, 2.0}, {0.1, 0.1}, {5, 5}), b = score_of({2.0, 2.0}, {0.1, 0.1}, {5, 6});
  REQUIRE_THROWS_AS(qat::eval::intervals({a, b}), qat::ArgumentError);
  REQUIRE_THROWS_AS(qat::eval::removed(a, b, a), qat::ArgumentError);
  REQUIRE_THROWS_AS(qat::eval::removed(a, a, b), qat::ArgumentError);
}
