#include "ptq/lattice_block.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "qat/grid/bf16.hpp"
#include "qat/grid/f16.hpp"

namespace qat::ptq {
namespace {

using grid::Status;

/// Fitting means something while steps are far coarser than the file's numbers.
constexpr int kMostFittedBits = 5;
/// Scales tried on each side of the middle of where they can lie.
constexpr int kProbes = 8;

int precision(FileType type) {
  return type == FileType::kBf16 ? 8 : type == FileType::kF16 ? 11 : 24;
}

int least_exponent(FileType type) {
  return type == FileType::kF16 ? -24 : type == FileType::kBf16 ? -133 : -149;
}

/// Half the distance from w to the farther of its neighbours in the type.
double half_step(FileType type, float w) {
  const int exponent = w == 0.0F ? least_exponent(type) : std::ilogb(w) - (precision(type) - 1);
  return 0.5 * std::ldexp(1.0, std::max(exponent, least_exponent(type)));
}

}  // namespace

float rounded_to(FileType type, float w) {
  if (type == FileType::kBf16) return grid::bf16_value(grid::bf16_bits(w));
  if (type == FileType::kF16) return grid::f16_value(grid::f16_bits(w));
  return w;
}

FileType file_type(const float* w, int64_t n) {
  for (const FileType type : {FileType::kBf16, FileType::kF16}) {
    if (std::all_of(w, w + n, [&](float one) { return rounded_to(type, one) == one; })) return type;
  }
  return FileType::kF32;
}

LatticeFinder::LatticeFinder(const grid::Grid& grid, FileType type, int64_t n)
    : grid_(grid),
      type_(type),
      n_(n),
      codes_(static_cast<std::size_t>(n)),
      w_hat_(static_cast<std::size_t>(n)) {}

/// Leaves the codes for `scale` in codes_.
bool LatticeFinder::is_exact(const float* w, float scale, float& stored) {
  if (grid_.store(&scale, n_, &stored) != Status::kOk || !std::isfinite(stored)) return false;
  grid_.encode(w, n_, &stored, codes_.data());
  grid_.decode(codes_.data(), n_, &stored, w_hat_.data());
  for (int64_t i = 0; i < n_; ++i) {
    if (rounded_to(type_, w_hat_[static_cast<std::size_t>(i)]) != w[i]) return false;
  }
  return true;
}

LatticeFinder::Interval LatticeFinder::interval(const float* w) const {
  Interval result{-std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()};
  for (int64_t i = 0; i < n_; ++i) {
    const double code = codes_[static_cast<std::size_t>(i)], half = half_step(type_, w[i]);
    if (code == 0.0) continue;
    const double one = (w[i] - half) / code, other = (w[i] + half) / code;
    result.low = std::max(result.low, std::min(one, other));
    result.high = std::min(result.high, std::max(one, other));
  }
  return result;
}

/// With the codes that `scale` gives: a scale for which the products are the weights.
std::optional<BlockLattice> LatticeFinder::exact_near(const float* w, float scale, Reading reading) {
  float stored = 0.0F;
  const bool own = is_exact(w, scale, stored);
  const BlockLattice as_given{stored, true};
  const Interval range = interval(w);
  if (!(range.low <= range.high) || !std::isfinite(range.low) || !std::isfinite(range.high)) {
    return own ? std::optional(as_given) : std::nullopt;
  }
  const auto middle = static_cast<float>(0.5 * (range.low + range.high));
  if (reading.bf16_scales && is_exact(w, rounded_to(FileType::kBf16, middle), stored)) {
    return BlockLattice{stored, true};
  }
  if (is_exact(w, middle, stored)) return BlockLattice{stored, true};
  // Weights at the ends of a binade bound the scale more tightly on one side than on the other.
  for (int step = 1; step <= kProbes; ++step) {
    for (const double side : {1.0, -1.0}) {
      const double at = 0.5 + side * 0.5 * step / (kProbes + 1);
      const auto probe = static_cast<float>(range.low + at * (range.high - range.low));
      if (is_exact(w, probe, stored)) return BlockLattice{stored, true};
    }
  }
  return own ? std::optional(as_given) : std::nullopt;
}

/// Whether all weights are whole numbers of steps, as far as their type can tell.
bool LatticeFinder::in_steps(const float* w, double scale) const {
  const double relative = std::ldexp(2.0, -precision(type_));
  for (int64_t i = 0; i < n_; ++i) {
    const double steps = w[i] / scale, code = std::nearbyint(steps);
    if (code < grid_.info().code_min || code > grid_.info().code_max) return false;
    if (std::abs(steps - code) > std::abs(steps) * relative + half_step(type_, w[i]) / std::abs(scale)) {
      return false;
    }
  }
  return true;
}

/// The largest step that fits. Of both signs, that of the grid's rule comes first: with it the largest weight
/// has a code on the same side as by the rule.
std::optional<BlockLattice> LatticeFinder::by_fit(const float* w, float rule, Reading reading) {
  const grid::Info& info = grid_.info();
  if (info.bits > kMostFittedBits) return std::nullopt;
  double largest = 0.0;
  for (int64_t i = 0; i < n_; ++i) largest = std::max<double>(largest, std::abs(w[i]));
  for (int code = 1; code <= std::max(-info.code_min, info.code_max); ++code) {
    for (const double sign : {1.0, -1.0}) {
      const double scale = sign * std::copysign(largest / code, rule);
      if (!in_steps(w, scale)) continue;
      if (auto found = exact_near(w, static_cast<float>(scale), reading)) {
        found->fitted = true;
        return found;
      }
    }
  }
  return std::nullopt;
}

LatticeFinder::Fit LatticeFinder::fit(const float* w, float scale) {
  Fit result{scale, 0, std::numeric_limits<double>::infinity(), 0.0};
  float stored = 0.0F;
  if (grid_.store(&scale, n_, &stored) != Status::kOk) return result;
  result.scale = stored;
  result.squares = 0.0;
  grid_.encode(w, n_, &scale, codes_.data());
  grid_.decode(codes_.data(), n_, &stored, w_hat_.data());
  for (int64_t i = 0; i < n_; ++i) {
    const float w_hat = w_hat_[static_cast<std::size_t>(i)];
    const double error = double{w_hat} - w[i];
    result.exact += rounded_to(type_, w_hat) == w[i] ? 1 : 0;
    result.squares += error * error;
    if (stored != 0.0F) result.worst = std::max(result.worst, std::abs(error / stored));
  }
  return result;
}

/// Of the rule's scale and the best one for its codes, the one with more exact weights, or the smaller error.
BlockLattice LatticeFinder::nearest(const float* w, float rule) {
  const Fit by_rule = fit(w, rule);
  double product = 0.0, square = 0.0;
  for (int64_t i = 0; i < n_; ++i) {
    const double code = codes_[static_cast<std::size_t>(i)];
    product += code * w[i];
    square += code * code;
  }
  const Fit refit = fit(w, static_cast<float>(square == 0.0 ? rule : product / square));
  const bool better =
      refit.exact != by_rule.exact ? refit.exact > by_rule.exact : refit.squares < by_rule.squares;
  const Fit& best = better ? refit : by_rule;
  return {best.scale, false, false, best.worst};
}

Status LatticeFinder::operator()(const float* w, Reading reading, BlockLattice& found) {
  float rule = 0.0F;
  if (const Status status = grid_.choose(w, n_, &rule); status != Status::kOk) return status;
  if (std::all_of(w, w + n_, [](float one) { return one == 0.0F; })) {
    found = {0.0F, true};
    return grid_.store(&rule, n_, &found.scale);
  }
  std::optional<BlockLattice> lattice =
      reading.fitted ? by_fit(w, rule, reading) : exact_near(w, rule, reading);
  if (!lattice) lattice = reading.fitted ? exact_near(w, rule, reading) : by_fit(w, rule, reading);
  found = lattice ? *lattice : nearest(w, rule);
  return Status::kOk;
}

}  // namespace qat::ptq
