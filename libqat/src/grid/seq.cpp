#include "qat/grid/seq.hpp"

#include <algorithm>
#include <cmath>

#include "qat/grid/device.hpp"
#include "qat/grid/q2_k.hpp"

namespace qat::grid {
namespace {

constexpr int kSubBlocks = Q2_K::kSubBlocks;
constexpr int kSubWeights = Q2_K::kWeights;
constexpr int kSubMins = 2 + kSubBlocks;

bool is_q2_k(const Grid& grid) noexcept {
  return grid.info().name == Q2_K::kInfo.name;
}

/// Significant bits of a stored scale.
int precision(DType dtype) noexcept {
  if (dtype == DType::kF16) return 11;
  return dtype == DType::kBF16 ? 8 : 24;
}

/// To that many significant bits, at most 23; ties to even. What is not finite stays so.
float rounded_to(float value, int bits) noexcept {
  if (!std::isfinite(value)) return value;
  const int dropped = 24 - bits;
  const uint32_t last = (bits_of(value) >> dropped) & 1U;
  const uint32_t sum = bits_of(value) + (1U << (dropped - 1)) - 1U + last;
  return float_of(sum & ~((1U << dropped) - 1U));
}

/// 1 / (2 k), and 1 - 1 / (2 k).
struct Fractions {
  float half_step;
  float outermost;
};

Fractions fractions(int bits) noexcept {
  const float half_step = 1.0F / static_cast<float>(1 << bits);
  return {half_step, 1.0F - half_step};
}

void start_q2_k(const float* w, float* free) noexcept {
  const float largest = absolute_maximum(w, kSuperBlock);
  free[0] = largest / static_cast<float>(2 * Q2_K::SubRule::kScaleMax);
  for (int sub = 0; sub < kSubBlocks; ++sub) {
    const float alpha = absolute_maximum(w + sub * kSubWeights, kSubWeights);
    free[1 + sub] = free[0] > 0.0F ? alpha / (2.0F * free[0]) : 0.0F;
  }
}

void tie_q2_k(const float* free, float* s) noexcept {
  s[0] = rounded_to(free[0], precision(DType::kF16) - 2);
  s[1] = 1.5F * s[0];
  for (int sub = 0; sub < kSubBlocks; ++sub) s[2 + sub] = s[kSubMins + sub] = free[1 + sub];
}

void tie_q2_k_backward(const float* grad_s, float* grad_free) noexcept {
  grad_free[0] = grad_s[0] + 1.5F * grad_s[1];
  for (int sub = 0; sub < kSubBlocks; ++sub) grad_free[1 + sub] = grad_s[2 + sub] + grad_s[kSubMins + sub];
}

}  // namespace

bool holds_seq(const Grid& grid) noexcept {
  const Info& info = grid.info();
  return is_q2_k(grid) || (info.name.starts_with("mlx") && info.bits <= 4);
}

std::string seq_names() {
  std::string listed;
  for (const std::string_view name : names()) {
    if (holds_seq(find(name))) listed.append(listed.empty() ? "" : ", ").append(name);
  }
  return listed;
}

int seq_params(const Grid& grid) noexcept {
  return is_q2_k(grid) ? 1 + kSubBlocks : 1;
}

std::vector<int> seq_groups(const Grid& grid) {
  return is_q2_k(grid) ? std::vector<int>{1, kSubBlocks} : std::vector<int>{1};
}

Status seq_start(const Grid& grid, const float* w, int64_t n, float* free) {
  if (!all_finite(w, n)) return Status::kNotFinite;
  const int64_t step = grid.block(n);
  for (int64_t i = 0; i < n; i += step, free += seq_params(grid)) {
    if (is_q2_k(grid)) {
      start_q2_k(w + i, free);
    } else {
      free[0] = absolute_maximum(w + i, step);
    }
  }
  return Status::kOk;
}

void seq_tie(const Grid& grid, const float* free, int64_t n, float* s) {
  const Info& info = grid.info();
  const Fractions of = fractions(info.bits);
  for (int64_t b = 0; b < grid.blocks(n); ++b, free += seq_params(grid), s += grid.params()) {
    if (is_q2_k(grid)) {
      tie_q2_k(free, s);
      continue;
    }
    const float alpha = rounded_to(free[0], precision(info.fields[0].dtype) - info.bits);
    s[0] = 2.0F * of.half_step * alpha;
    s[1] = -of.outermost * alpha;
  }
}

void seq_untie(const Grid& grid, const float* s, int64_t n, float* free) {
  for (int64_t b = 0; b < grid.blocks(n); ++b, free += seq_params(grid), s += grid.params()) {
    if (is_q2_k(grid)) {
      free[0] = s[0];
      std::copy_n(s + 2, kSubBlocks, free + 1);
    } else {
      free[0] = s[0] / (2.0F * fractions(grid.info().bits).half_step);
    }
  }
}

void seq_tie_backward(const Grid& grid, const float* grad_s, int64_t n, float* grad_free) {
  const Fractions of = fractions(grid.info().bits);
  for (int64_t b = 0; b < grid.blocks(n); ++b, grad_s += grid.params(), grad_free += seq_params(grid)) {
    if (is_q2_k(grid)) {
      tie_q2_k_backward(grad_s, grad_free);
    } else {
      grad_free[0] = 2.0F * of.half_step * grad_s[0] - of.outermost * grad_s[1];
    }
  }
}

}  // namespace qat::grid
