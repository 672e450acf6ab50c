#include "ops/rows.hpp"

#include <cmath>

#include "qat/core/error.hpp"
#include "qat/grid/device.hpp"

namespace qat::ops {

void fail_row(const Subject& subject, int64_t row, grid::Status status) {
  throw NumericError(to_string(subject) + ": row " + std::to_string(row) + " " +
                     std::string(grid::to_string(status)));
}

GridRows::GridRows(const grid::Grid& grid, const at::Tensor& latent)
    : w_(latent.const_data_ptr<float>()),
      rows_(latent.size(0)),
      count_(grid.scale_rows(rows_)),
      width_(latent.numel() / count_) {}

int64_t GridRows::operator()(int64_t row, grid::Status status) const {
  if (count_ == rows_) return row;
  const int64_t n = width_ / rows_;
  int64_t worst = 0;
  float largest = 0.0F;
  for (int64_t r = 0; r < rows_; ++r) {
    const float* w = w_ + r * n;
    if (status == grid::Status::kNotFinite && !grid::all_finite(w, n)) return r;
    const float magnitude = grid::absolute_maximum(w, n);
    if (magnitude > largest) worst = r;
    largest = std::max(largest, magnitude);
  }
  return worst;
}

void quantize_rows(const Subject& subject, const grid::Grid& grid, const Scales& scales,
                   const at::Tensor& latent, const at::Tensor& w_hat) {
  const GridRows rows(grid, latent);
  const int64_t n = rows.width();
  const HeldRows held(grid, scales, n);
  const float* from = latent.const_data_ptr<float>();
  const auto each_row = [&](const auto& quantize_row) {
    for_each_row(subject, rows.count(), n, [&] { return quantize_row; }, rows);
  };
  if (w_hat.scalar_type() == at::kFloat) {
    float* to = w_hat.mutable_data_ptr<float>();
    each_row([&](int64_t row) {
      return held.any() ? grid.fake_quantize_with(from + row * n, n, held(row), to + row * n)
                        : grid.fake_quantize(from + row * n, n, to + row * n, scales.rule);
    });
  } else {
    auto* to = reinterpret_cast<uint16_t*>(w_hat.mutable_data_ptr<at::BFloat16>());
    each_row([&](int64_t row) {
      return held.any() ? grid.fake_quantize_bf16_with(from + row * n, n, held(row), to + row * n)
                        : grid.fake_quantize_bf16(from + row * n, n, to + row * n, scales.rule);
    });
  }
}

void backward_rows(const Subject& subject, const grid::Grid& grid, const Scales& scales, EstimatorKind kind,
                   const at::Tensor& grad, const at::Tensor& latent, const at::Tensor& grad_weight,
                   const at::Tensor& grad_scales, const std::vector<float>& factors) {
  const GridRows rows(grid, latent);
  const int64_t n = rows.width();
  const HeldRows held(grid, scales, n);
  const int64_t count = grid.blocks(n) * grid.params();
  const bool through_rule = scales.rule == ScaleRule::kDifferentiated;
  const float* g = grad.const_data_ptr<float>();
  const float* w = latent.const_data_ptr<float>();
  float* to = grad_weight.mutable_data_ptr<float>();
  float* to_scales = grad_scales.defined() ? grad_scales.mutable_data_ptr<float>() : nullptr;
  const auto make = [&] {
    return [&, chosen = std::vector<float>(held.any() ? 0 : count),
            by_rule = std::vector<float>(through_rule ? count : 0)](int64_t row) mutable {
      const float* w_row = w + row * n;
      if (!held.any()) {
        const grid::Status status = grid.scales(scales.rule, w_row, n, chosen.data());
        if (status != grid::Status::kOk) return status;
      }
      float* grad_s = to_scales != nullptr ? to_scales + row * count : nullptr;
      if (through_rule) grad_s = by_rule.data();
      const float* s = held.any() ? held(row) : chosen.data();
      const grid::Status status = grid.backward(w_row, n, s, g + row * n, kind, to + row * n, grad_s);
      if (status != grid::Status::kOk || grad_s == nullptr) return status;
      if (through_rule) return grid.choose_backward(w_row, n, grad_s, to + row * n);
      for (int64_t i = 0; i < count && !factors.empty(); ++i) grad_s[i] *= factors[i % factors.size()];
      return status;
    };
  };
  for_each_row(subject, rows.count(), n, make, rows);
}

std::vector<float> scale_factors(const grid::Grid& grid, ScaleGradient rule, const at::Tensor& weight) {
  std::vector<float> factors;
  if (rule == ScaleGradient::kPlain) return factors;
  const int64_t total = weight.numel();
  const int64_t block = grid.block(total / grid.scale_rows(weight.size(0)));
  for (const grid::Field& field : grid.info().fields) {
    const int64_t sharing = rule == ScaleGradient::kTensor ? total : block / field.count;
    const double factor = 1.0 / std::sqrt(static_cast<double>(sharing) * grid.info().code_max);
    factors.insert(factors.end(), static_cast<size_t>(field.count), static_cast<float>(factor));
  }
  return factors;
}

}  // namespace qat::ops
