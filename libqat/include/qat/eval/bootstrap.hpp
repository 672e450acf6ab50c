#pragma once

// Paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections 13.3 and 16.4):
// how far a figure would move on other items of the same kind. Items are the windows of a text, questions,
// images.

#include <cstdint>
#include <vector>

#include "qat/eval/eval.hpp"

namespace qat::eval {

/// NaN on both sides where there is no interval.
struct Interval {
  double low = 0, high = 0;
};

/// How an interval is drawn.
struct BootstrapOptions {
  int64_t resamples = 10000;  ///< 1 or more; 10000 place the ends of an interval to about 1 % of its width
  uint64_t seed = 0;
  double level = 0.95;  ///< share of the resamples inside the interval, in (0, 1)
};

/// Weighted means of several series over the same n items, in each of R resamples: [series][R]. A resample
/// draws n items with replacement, the same ones for all series, so that differences and quotients of series
/// are paired. Draw i of resample r is item floor(u n / 2^64), where u is output r n + i (from 0) of
/// SplitMix64 started at `seed`: the same on each machine and for each number of threads. series: n values
/// each. weights: n positive numbers, such as the tokens of each window; empty = all 1. ArgumentError for no
/// items, other sizes or weights, and for options out of range.
std::vector<std::vector<double>> resampled_means(const std::vector<std::vector<double>>& series,
                                                 const std::vector<double>& weights,
                                                 const BootstrapOptions& options = {});

/// The central `level` of `samples`, with linear interpolation between order statistics (type 7, numpy's
/// default). NaN when any sample is NaN or there are none.
Interval percentile_interval(std::vector<double> samples, double level = 0.95);

/// Interval of the weighted mean of n values. NaN for a single item, which says nothing about others.
Interval mean_interval(const std::vector<double>& values, const std::vector<double>& weights = {},
                       const BootstrapOptions& options = {});

/// Intervals of one model's Score.
struct ScoreIntervals {
  Interval nll, perplexity, kl, top1;
};

/// Of each score, over windows weighted by their tokens. NaN for a text of a single window. ArgumentError
/// when the scores are not of the same windows.
std::vector<ScoreIntervals> intervals(const std::vector<Score>& scores, const BootstrapOptions& options = {});

/// Shares that training removed from the cost of quantization, see `share_removed`: of the KL, and of the
/// loss above the reference's. Numerator and denominator come from the same resampled windows.
/// An interval is NaN when the quantized model's cost is not positive in every resample: then the text does
/// not show that there is anything to remove.
struct Removed {
  double kl = 0, nll = 0;
  Interval kl_interval, nll_interval;
};

/// reference, quantized, trained: scores of the same windows; ArgumentError when they are not.
Removed removed(const Score& reference, const Score& quantized, const Score& trained,
                const BootstrapOptions& options = {});

}  // namespace qat::eval
