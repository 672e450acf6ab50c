#include "qat/eval/bootstrap.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "qat/core/error.hpp"

namespace qat::eval {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

[[noreturn]] void fail(const std::string& subject, const std::string& expected, const std::string& got) {
  throw ArgumentError("eval::bootstrap: " + subject + ": expected " + expected + ", got " + got);
}

/// Output k of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) started at `seed`; random access.
uint64_t split_mix(uint64_t seed, uint64_t k) noexcept {
  uint64_t z = seed + (k + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/// floor(u n / 2^64) in 32-bit halves; n < 2^32. Never n, and its bias is below n / 2^64.
uint64_t scaled(uint64_t u, uint64_t n) noexcept {
  const uint64_t high = (u >> 32) * n, low = (u & 0xFFFFFFFFu) * n;
  return (high + (low >> 32)) >> 32;
}

void check(const BootstrapOptions& options) {
  if (options.resamples < 1) fail("resamples", "at least 1", std::to_string(options.resamples));
  if (!(options.level > 0 && options.level < 1)) {
    fail("level", "a number between 0 and 1", std::to_string(options.level));
  }
}

std::vector<double> checked_weights(const std::vector<double>& weights, std::size_t items) {
  if (items == 0 || items > std::numeric_limits<uint32_t>::max()) {
    fail("items", "1 to 2^32 - 1", std::to_string(items));
  }
  if (weights.empty()) return std::vector<double>(items, 1.0);
  if (weights.size() != items)
    fail("weights", std::to_string(items) + " of them", std::to_string(weights.size()));
  for (std::size_t i = 0; i < items; ++i) {
    if (!(weights[i] > 0 && std::isfinite(weights[i]))) {
      fail("weights[" + std::to_string(i) + "]", "a positive number", std::to_string(weights[i]));
    }
  }
  return weights;
}

std::vector<double> weights_of(const Score& score) {
  return {score.window_tokens.begin(), score.window_tokens.end()};
}

void check_windows(const Score& score, const Score& other) {
  if (score.window_tokens != other.window_tokens) {
    fail("scores", "scores of the same windows",
         std::to_string(other.window_tokens.size()) + " other windows");
  }
}

std::vector<double> difference(std::vector<double> a, const std::vector<double>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  return a;
}

/// `share_removed` in each resample; it is NaN where the quantized cost is not positive.
Interval share_interval(const std::vector<double>& quantized, const std::vector<double>& trained,
                        double level) {
  std::vector<double> shares;
  for (std::size_t r = 0; r < quantized.size(); ++r) {
    shares.push_back(share_removed(quantized[r], trained[r]));
  }
  return percentile_interval(std::move(shares), level);
}

}  // namespace

std::vector<std::vector<double>> resampled_means(const std::vector<std::vector<double>>& series,
                                                 const std::vector<double>& weights,
                                                 const BootstrapOptions& options) {
  check(options);
  const std::size_t items = series.empty() ? weights.size() : series.front().size();
  const std::vector<double> weight = checked_weights(weights, items);
  for (const auto& values : series) {
    if (values.size() != items)
      fail("series", std::to_string(items) + " values", std::to_string(values.size()));
  }
  std::vector<std::vector<double>> means(series.size(), std::vector<double>(options.resamples));
  at::parallel_for(0, options.resamples, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> chosen(items);
    for (int64_t r = begin; r < end; ++r) {
      double total = 0;
      for (std::size_t i = 0; i < items; ++i) {
        const uint64_t draw = static_cast<uint64_t>(r) * items + i;
        chosen[i] = static_cast<uint32_t>(scaled(split_mix(options.seed, draw), items));
        total += weight[chosen[i]];
      }
      for (std::size_t s = 0; s < series.size(); ++s) {
        double sum = 0;
        for (const uint32_t item : chosen) sum += weight[item] * series[s][item];
        means[s][r] = sum / total;
      }
    }
  });
  return means;
}

Interval percentile_interval(std::vector<double> samples, double level) {
  const bool undefined = std::any_of(samples.begin(), samples.end(), [](double x) { return std::isnan(x); });
  if (samples.empty() || undefined) return {kNaN, kNaN};
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double share) {
    const double place = share * static_cast<double>(samples.size() - 1);
    const auto below = static_cast<std::size_t>(place);
    const std::size_t above = std::min(below + 1, samples.size() - 1);
    if (samples[below] == samples[above]) return samples[below];  // infinite ones too
    return samples[below] + (place - static_cast<double>(below)) * (samples[above] - samples[below]);
  };
  return {at((1 - level) / 2), at((1 + level) / 2)};
}

Interval mean_interval(const std::vector<double>& values, const std::vector<double>& weights,
                       const BootstrapOptions& options) {
  auto means = resampled_means({values}, weights, options);
  if (values.size() == 1) return {kNaN, kNaN};
  return percentile_interval(std::move(means[0]), options.level);
}

std::vector<ScoreIntervals> intervals(const std::vector<Score>& scores, const BootstrapOptions& options) {
  if (scores.empty()) return {};
  std::vector<std::vector<double>> series;
  for (const Score& score : scores) {
    check_windows(scores[0], score);
    series.insert(series.end(), {score.window_nll, score.window_kl, score.window_top1});
  }
  auto means = resampled_means(series, weights_of(scores[0]), options);
  if (scores[0].window_tokens.size() == 1) {
    for (auto& samples : means) samples.clear();
  }
  std::vector<ScoreIntervals> result;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    ScoreIntervals one;
    one.nll = percentile_interval(std::move(means[3 * i]), options.level);
    one.perplexity = {std::exp(one.nll.low), std::exp(one.nll.high)};
    one.kl = percentile_interval(std::move(means[3 * i + 1]), options.level);
    one.top1 = percentile_interval(std::move(means[3 * i + 2]), options.level);
    result.push_back(one);
  }
  return result;
}

Removed removed(const Score& reference, const Score& quantized, const Score& trained,
                const BootstrapOptions& options) {
  check_windows(reference, quantized);
  check_windows(reference, trained);
  const auto means = resampled_means(
      {quantized.window_kl, trained.window_kl, difference(quantized.window_nll, reference.window_nll),
       difference(trained.window_nll, reference.window_nll)},
      weights_of(reference), options);
  Removed result{share_removed(quantized.kl, trained.kl),
                 share_removed(quantized.nll - reference.nll, trained.nll - reference.nll),
                 {kNaN, kNaN},
                 {kNaN, kNaN}};
  if (reference.window_tokens.size() == 1) return result;
  result.kl_interval = share_interval(means[0], means[1], options.level);
  result.nll_interval = share_interval(means[2], means[3], options.level);
  return result;
}

}  // namespace qat::eval
