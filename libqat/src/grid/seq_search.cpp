#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "qat/grid/device.hpp"
#include "qat/grid/q2_k.hpp"
#include "qat/grid/seq.hpp"

namespace qat::grid {
namespace {

/// The ladder of alpha / max|w|: from where long rows of normal weights are best at 2 bits to where the
/// largest weight is the outermost level of 2 bits, and a little more.
constexpr float kFirstFactor = 0.4F, kFactorStep = 0.05F;
constexpr int kFactors = 21;
/// Rounds of fitting alpha to levels and levels to alpha.
constexpr int kRounds = 4;

/// Weights that share an alpha, and how much each counts.
struct Weights {
  const float* w;
  const double* importance;  ///< null: all alike
  int64_t n;

  double counts(int64_t i) const noexcept { return importance == nullptr ? 1.0 : importance[i]; }
};

/// The level of w / alpha: half-integers over k, the outermost at 1 - 1 / (2 k).
float level_of(float w, float alpha, float k) noexcept {
  const float rounded = std::nearbyint(w / alpha * k - 0.5F);
  return (std::clamp(rounded, -k, k - 1.0F) + 0.5F) / k;
}

/// The squared error under alpha, and the alpha of least squares for its levels.
struct Fit {
  double error;
  float alpha;
};

Fit fit(const Weights& weights, float alpha, float k) noexcept {
  double error = 0.0, product = 0.0, square = 0.0;
  for (int64_t i = 0; i < weights.n; ++i) {
    const float level = level_of(weights.w[i], alpha, k);
    const double difference = static_cast<double>(weights.w[i]) - static_cast<double>(alpha) * level;
    error += weights.counts(i) * difference * difference;
    product += weights.counts(i) * weights.w[i] * level;
    square += weights.counts(i) * level * level;
  }
  return {error, square > 0.0 ? static_cast<float>(product / square) : 0.0F};
}

/// The alpha of least squared error; 0 for weights that are all zero.
float best_alpha(const Weights& weights, float k) noexcept {
  const float largest = absolute_maximum(weights.w, weights.n);
  if (!(largest > 0.0F)) return 0.0F;
  float best = largest;
  double least = std::numeric_limits<double>::infinity();
  float candidate = 0.0F;
  for (int i = 0; i < kFactors + kRounds; ++i) {
    // the ladder first, then the fits of the best so far
    candidate = i < kFactors ? largest * (kFirstFactor + kFactorStep * static_cast<float>(i))
                             : fit(weights, best, k).alpha;
    if (!(candidate > 0.0F) || !std::isfinite(candidate)) continue;
    const double error = fit(weights, candidate, k).error;
    if (!(error < least)) continue;
    least = error;
    best = candidate;
  }
  return best;
}

/// d and sub-scales of a block of q2_k, from the best alpha of each sub-block.
class SuperBlock {
 public:
  static constexpr int kSubBlocks = Q2_K::kSubBlocks;
  static constexpr int64_t kSubWeights = Q2_K::kWeights;
  static constexpr float kLevels = 2.0F;  // k of 2 bits

  SuperBlock(const float* w, const double* importance) noexcept {
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const int64_t first = sub * kSubWeights;
      subs_[sub] = {w + first, importance == nullptr ? nullptr : importance + first, kSubWeights};
      alphas_[sub] = best_alpha(subs_[sub], kLevels);
    }
  }

  /// False for a block of zeros, and where nothing was found.
  bool operator()(float* free) {
    const float largest = *std::max_element(alphas_.begin(), alphas_.end());
    const int most = Q2_K::SubRule::kScaleMax;
    for (int top = most; top > most / 2; --top) offer(largest / static_cast<float>(2 * top));
    for (int round = 0; round < kRounds && std::isfinite(least_); ++round) {
      if (!offer(fitted())) break;
    }
    if (!std::isfinite(least_)) return false;
    std::copy(best_.begin(), best_.end(), free);
    return true;
  }

 private:
  /// Takes d, with the best neighbours of each alpha / 2 d as sub-scales, where the error is less.
  bool offer(float d) {
    if (!(d > 0.0F) || !std::isfinite(d)) return false;
    std::array<float, 1 + kSubBlocks> free{d};
    double sum = 0.0;
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const float below = std::floor(alphas_[sub] / (2.0F * d));
      double least = std::numeric_limits<double>::infinity();
      for (const float neighbour : {below, below + 1.0F}) {
        const float scale = std::clamp(neighbour, 0.0F, static_cast<float>(Q2_K::SubRule::kScaleMax));
        const double error = error_of(subs_[sub], 2.0F * d * scale);
        if (!(error < least)) continue;
        least = error;
        free[1 + sub] = scale;
      }
      sum += least;
    }
    if (!(sum < least_)) return false;
    least_ = sum;
    best_ = free;
    return true;
  }

  static double error_of(const Weights& weights, float alpha) noexcept {
    if (alpha > 0.0F) return fit(weights, alpha, kLevels).error;
    double sum = 0.0;
    for (int64_t i = 0; i < weights.n; ++i) {
      sum += weights.counts(i) * static_cast<double>(weights.w[i]) * weights.w[i];
    }
    return sum;
  }

  /// d of least squares for the levels of the best so far.
  float fitted() const noexcept {
    double product = 0.0, square = 0.0;
    for (int sub = 0; sub < kSubBlocks; ++sub) {
      const Weights& weights = subs_[sub];
      const float alpha = 2.0F * best_[0] * best_[1 + sub];
      for (int64_t i = 0; i < weights.n && alpha > 0.0F; ++i) {
        const double level = 2.0 * best_[1 + sub] * level_of(weights.w[i], alpha, kLevels);
        product += weights.counts(i) * weights.w[i] * level;
        square += weights.counts(i) * level * level;
      }
    }
    return square > 0.0 ? static_cast<float>(product / square) : 0.0F;
  }

  std::array<Weights, kSubBlocks> subs_{};
  std::array<float, kSubBlocks> alphas_{};
  std::array<float, 1 + kSubBlocks> best_{};
  double least_ = std::numeric_limits<double>::infinity();
};

/// What the file's arithmetic makes of one block; infinite where it cannot hold the scales.
class Judge {
 public:
  Judge(const Grid& grid, int64_t block) : grid_(grid), s_(grid.params()), w_hat_(block) {}

  double operator()(const Weights& weights, const float* free) {
    seq_tie(grid_, free, weights.n, s_.data());
    if (grid_.fake_quantize_with(weights.w, weights.n, s_.data(), w_hat_.data()) != Status::kOk) {
      return std::numeric_limits<double>::infinity();
    }
    double sum = 0.0;
    for (int64_t i = 0; i < weights.n; ++i) {
      const double difference = static_cast<double>(weights.w[i]) - w_hat_[i];
      sum += weights.counts(i) * difference * difference;
    }
    return sum;
  }

 private:
  const Grid& grid_;
  std::vector<float> s_, w_hat_;
};

/// Puts what was found into `free`; false where nothing was.
bool search_block(const Grid& grid, const Weights& weights, float* free) {
  if (seq_params(grid) > 1) return SuperBlock(weights.w, weights.importance)(free);
  free[0] = best_alpha(weights, static_cast<float>(1 << (grid.info().bits - 1)));
  return free[0] > 0.0F;
}

}  // namespace

Status seq_search(const Grid& grid, const float* w, int64_t n, float* free, const double* importance) {
  const Status status = seq_start(grid, w, n, free);
  if (status != Status::kOk) return status;
  const int64_t block = grid.block(n);
  std::vector<float> found(seq_params(grid));
  Judge judge(grid, block);
  for (int64_t i = 0; i < n; i += block, free += seq_params(grid)) {
    const Weights weights{w + i, importance == nullptr ? nullptr : importance + i, block};
    if (!search_block(grid, weights, found.data())) continue;
    // Rounded to what the file holds, it may have lost what it won.
    if (judge(weights, found.data()) < judge(weights, free)) std::copy(found.begin(), found.end(), free);
  }
  return Status::kOk;
}

}  // namespace qat::grid
