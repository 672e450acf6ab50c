#include "ptq/row_refiner.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "ptq/row_ops.hpp"

namespace qat::ptq {
namespace {

using grid::Status;

bool is_linear(const grid::Grid& grid) {
  const auto& fields = grid.info().fields;
  return grid.params() <= 2 && std::all_of(fields.begin(), fields.end(), [](const grid::Field& field) {
           return field.dtype != grid::DType::kU8 && field.dtype != grid::DType::kI8;
         });
}

}  // namespace

RowRefiner::RowRefiner(const grid::Grid& grid, const float* hessian, int64_t n, int64_t sweeps,
                       bool hold_scales)
    : grid_(grid),
      hessian_(hessian),
      n_(n),
      sweeps_(sweeps),
      block_(grid.block(n)),
      params_(grid.params()),
      levels_count_(grid.info().code_max - grid.info().code_min + 1),
      linear_(!hold_scales && is_linear(grid)),
      latent_(n),
      scales_(grid.blocks(n) * grid.params()),
      stored_(scales_.size()),
      codes_(n),
      w_hat_(n),
      h_error_(n),
      levels_(levels_count_ * block_),
      unit_(params_ * block_),
      trial_(block_),
      constant_(block_) {}

Status RowRefiner::load(const float* h_error, const float* latent, const float* scales) {
  std::copy_n(latent, n_, latent_.data());
  std::copy_n(scales, scales_.size(), scales_.data());
  std::copy_n(h_error, n_, h_error_.data());
  const Status status = grid_.store(scales_.data(), n_, stored_.data());
  if (status != Status::kOk) return status;
  grid_.encode(latent_.data(), n_, scales_.data(), codes_.data());
  grid_.decode(codes_.data(), n_, stored_.data(), w_hat_.data());
  return Status::kOk;
}

void RowRefiner::shift(int64_t first, const float* change) {
  for (int64_t i = 0; i < block_; ++i) w_hat_[first + i] += change[i];
  subtract_rows(hessian_ + first * n_, n_, change, block_, n_, h_error_.data());
}

double RowRefiner::with_hessian(int64_t first, const float* a, const float* b) const {
  return bilinear(a, hessian_ + first * n_ + first, n_, b, block_);
}

double RowRefiner::with_error(int64_t first, const float* a) const {
  return dot(a, h_error_.data() + first, block_);
}

/// The change of the block's parameters that least squares asks for; false where they do not determine it.
bool RowRefiner::solve_scales(const float* unit, int64_t first, float* change) {
  const double h00 = with_hessian(first, unit, unit), g0 = with_error(first, unit);
  if (!(h00 > 0.0)) return false;
  if (params_ == 1) {
    change[0] = static_cast<float>(g0 / h00);
    return true;
  }
  const float* second = unit + block_;
  const double h11 = with_hessian(first, second, second), g1 = with_error(first, second);
  const double h01 = with_hessian(first, unit, second);
  const double determinant = h00 * h11 - h01 * h01;
  if (!(determinant > 1e-9 * h00 * h11)) return false;
  change[0] = static_cast<float>((g0 * h11 - g1 * h01) / determinant);
  change[1] = static_cast<float>((g1 * h00 - g0 * h01) / determinant);
  return true;
}

void RowRefiner::move_scales(int64_t block) {
  const int64_t first = block * block_;
  float* stored = stored_.data() + block * params_;
  const int8_t* codes = codes_.data() + first;
  for (int p = 0; p < params_; ++p) {
    std::array<float, 2> one{};
    one[p] = 1.0F;
    grid_.decode(codes, block_, one.data(), unit_.data() + p * block_);
  }
  std::array<float, 2> moved{};
  if (!solve_scales(unit_.data(), first, moved.data())) return;
  for (int p = 0; p < params_; ++p) moved[p] += stored[p];
  // A sign that turns would turn the codes' meaning over, too.
  if (moved[0] == 0.0F || std::signbit(moved[0]) != std::signbit(stored[0])) return;
  if (grid_.store(moved.data(), block_, moved.data()) != Status::kOk) return;
  if (std::equal(moved.begin(), moved.begin() + params_, stored)) return;
  grid_.decode(codes, block_, moved.data(), trial_.data());
  for (int64_t i = 0; i < block_; ++i) trial_[i] -= w_hat_[first + i];
  const float* change = trial_.data();
  if (!(with_hessian(first, change, change) < 2.0 * with_error(first, change))) return;
  shift(first, change);
  grid_.decode(codes, block_, moved.data(), w_hat_.data() + first);
  std::copy_n(moved.data(), params_, stored);
  std::copy_n(moved.data(), params_, scales_.data() + block * params_);
}

void RowRefiner::make_levels(int64_t block) {
  for (int level = 0; level < levels_count_; ++level) {
    std::fill(constant_.begin(), constant_.end(), static_cast<int8_t>(grid_.info().code_min + level));
    grid_.decode(constant_.data(), block_, stored_.data() + block * params_, levels_.data() + level * block_);
  }
}

void RowRefiner::move_codes(int64_t block) {
  make_levels(block);
  const int64_t first = block * block_;
  for (int64_t i = 0; i < block_; ++i) {
    const int64_t j = first + i;
    const float curvature = hessian_[j * n_ + j];
    if (!(curvature > 0.0F)) continue;
    const float best = w_hat_[j] + h_error_[j] / curvature;
    int nearest = codes_[j] - grid_.info().code_min;
    float least = std::fabs(levels_[nearest * block_ + i] - best);
    for (int level = 0; level < levels_count_; ++level) {
      const float distance = std::fabs(levels_[level * block_ + i] - best);
      if (distance < least) {
        least = distance;
        nearest = level;
      }
    }
    latent_[j] = best;
    const float change = levels_[nearest * block_ + i] - w_hat_[j];
    if (change == 0.0F) continue;
    codes_[j] = static_cast<int8_t>(grid_.info().code_min + nearest);
    w_hat_[j] += change;
    add_scaled(hessian_ + j * n_, n_, -change, h_error_.data());
  }
}

void RowRefiner::sweep() {
  for (int64_t block = 0; block < n_ / block_; ++block) {
    if (linear_) move_scales(block);
    move_codes(block);
  }
}

void RowRefiner::finish(float* h_error, float* latent, float* scales) {
  std::vector<int8_t> encoded(n_);
  for (int attempt = 0; attempt < 2; ++attempt) {
    grid_.encode(latent_.data(), n_, scales_.data(), encoded.data());
    if (encoded == codes_) {
      std::copy(latent_.begin(), latent_.end(), latent);
      std::copy(scales_.begin(), scales_.end(), scales);
      std::copy(h_error_.begin(), h_error_.end(), h_error);
      return;
    }
    // Scales have moved since, or the value lies on the border of two levels: the level itself will do.
    for (int64_t i = 0; i < n_; ++i) {
      if (encoded[i] != codes_[i]) latent_[i] = w_hat_[i];
    }
  }
}

Status RowRefiner::operator()(const float* w, float* h_error, float* latent, float* scales) {
  if (!std::all_of(w, w + n_, [](float value) { return std::isfinite(value); })) return Status::kNotFinite;
  const Status status = load(h_error, latent, scales);
  if (status != Status::kOk) return status;
  for (int64_t i = 0; i < sweeps_; ++i) sweep();
  finish(h_error, latent, scales);
  return Status::kOk;
}

}  // namespace qat::ptq
