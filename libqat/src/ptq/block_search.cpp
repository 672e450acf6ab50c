#include "ptq/block_search.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace qat::ptq {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
/// The ladder of factors: from where 2 bits are best for a long row of normal weights to a little above all.
constexpr float kFirstFactor = 0.35F, kFactorStep = 0.05F;
constexpr int kFactors = 16;
/// Rounds of fitting scales to codes and codes to scales.
constexpr int kRounds = 4;

}  // namespace

BlockSearch::BlockSearch(const grid::Grid& grid, int64_t n)
    : grid_(grid),
      n_(n),
      params_(grid.params()),
      best_(params_),
      candidate_(params_),
      stored_(params_),
      scaled_(n),
      decoded_(n),
      moved_(n),
      lengths_(params_),
      steps_(params_ * n),
      base_(n),
      base_stored_(params_),
      codes_(n),
      base_codes_(n) {}

double BlockSearch::error(const float* s) {
  if (grid_.store(s, n_, stored_.data()) != grid::Status::kOk) return kInfinity;
  grid_.encode(w_, n_, s, codes_.data());
  grid_.decode(codes_.data(), n_, stored_.data(), decoded_.data());
  double sum = 0.0;
  for (int64_t i = 0; i < n_; ++i) {
    const double difference = static_cast<double>(w_[i]) - decoded_[i];
    sum += importance_[i] * difference * difference;
  }
  return sum;
}

bool BlockSearch::offer(const float* s) {
  const double found = error(s);
  if (!(found < least_)) return false;
  least_ = found;
  std::copy_n(s, params_, best_.begin());
  return true;
}

void BlockSearch::offer_rule(float factor) {
  for (int64_t i = 0; i < n_; ++i) scaled_[i] = factor * w_[i];
  if (grid_.choose(scaled_.data(), n_, candidate_.data()) == grid::Status::kOk) offer(candidate_.data());
}

void BlockSearch::linearise() {
  error(best_.data());
  base_codes_ = codes_;
  base_stored_ = stored_;
  base_ = decoded_;
  for (int p = 0; p < params_; ++p) {
    candidate_ = base_stored_;
    lengths_[p] = base_stored_[p] != 0.0F ? base_stored_[p] : 1.0F;
    candidate_[p] += lengths_[p];
    grid_.decode(base_codes_.data(), n_, candidate_.data(), moved_.data());
    double* step = steps_.data() + p * n_;
    for (int64_t i = 0; i < n_; ++i) step[i] = static_cast<double>(moved_[i]) - base_[i];
  }
}

bool BlockSearch::offer_fitted(int first, int last) {
  // Normal equations of one or two parameters.
  std::array<double, 3> squares{};
  std::array<double, 2> sides{};
  const double* a = steps_.data() + first * n_;
  const double* b = steps_.data() + (last - 1) * n_;
  for (int64_t i = 0; i < n_; ++i) {
    const double left = importance_[i] * (static_cast<double>(w_[i]) - base_[i]);
    sides[0] += left * a[i];
    sides[1] += left * b[i];
    squares[0] += importance_[i] * a[i] * a[i];
    squares[1] += importance_[i] * a[i] * b[i];
    squares[2] += importance_[i] * b[i] * b[i];
  }
  candidate_ = base_stored_;
  if (last - first == 1) {
    candidate_[first] += lengths_[first] * static_cast<float>(sides[0] / squares[0]);
  } else {
    const double determinant = squares[0] * squares[2] - squares[1] * squares[1];
    const double along_a = (sides[0] * squares[2] - sides[1] * squares[1]) / determinant;
    const double along_b = (sides[1] * squares[0] - sides[0] * squares[1]) / determinant;
    candidate_[first] += lengths_[first] * static_cast<float>(along_a);
    candidate_[last - 1] += lengths_[last - 1] * static_cast<float>(along_b);
  }
  const bool finite =
      std::all_of(candidate_.begin(), candidate_.end(), [](float s) { return std::isfinite(s); });
  if (!finite || grid_.store(candidate_.data(), n_, candidate_.data()) != grid::Status::kOk) return false;
  return offer(candidate_.data());
}

void BlockSearch::refit() {
  for (int round = 0; round < kRounds; ++round) {
    linearise();
    bool better = params_ == 2 && offer_fitted(0, 2);
    for (int p = 0; p < params_; ++p) {
      if (!offer_fitted(p, p + 1)) continue;
      better = true;
      linearise();
    }
    if (!better) return;
  }
}

grid::Status BlockSearch::operator()(const float* w, const double* importance, float* s) {
  const grid::Status status = grid_.search(w, n_, s);
  const bool counts = std::any_of(importance, importance + n_, [](double one) { return one > 0.0; });
  if (status != grid::Status::kOk || !counts) return status;
  w_ = w;
  importance_ = importance;
  grid_.choose(w, n_, best_.data());
  least_ = error(best_.data());
  offer(s);
  const bool both_signs = params_ == 1 && grid_.info().code_min != -grid_.info().code_max;
  for (int i = 0; i < kFactors; ++i) {
    const float factor = kFirstFactor + kFactorStep * static_cast<float>(i);
    offer_rule(factor);
    if (both_signs) offer_rule(-factor);
  }
  refit();
  std::copy(best_.begin(), best_.end(), s);
  return grid::Status::kOk;
}

}  // namespace qat::ptq
