#pragma once

// Row kernels over whole tensors: rows are independent, so they are split over the intra-op threads and the
// result does not depend on how many there are.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "ops/check.hpp"
#include "qat/grid/grid.hpp"

namespace qat::ops {

/// Remembers the lowest row that failed, from any thread.
class FirstFailure {
 public:
  void record(int64_t row) noexcept {
    int64_t seen = row_.load();
    while (row < seen && !row_.compare_exchange_weak(seen, row)) {
    }
  }
  /// -1 when no row failed.
  int64_t row() const noexcept { return row_ == kNone ? -1 : row_.load(); }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> row_{kNone};
};

/// Throws NumericError "op: tensor: row 7 is not finite".
[[noreturn]] void fail_row(const Subject& subject, int64_t row, grid::Status status);

/// The number of a row in a message: its own.
struct OwnNumber {
  int64_t operator()(int64_t row, grid::Status) const noexcept { return row; }
};

/// Runs a function `Status (int64_t row)` on rows [0, rows) of n weights each. `make` returns that function;
/// it is called once per range of rows, so the function may own buffers. Throws NumericError for the lowest
/// row with a status other than kOk; `number(row, status)` is its number in the message.
template <class Make, class Number = OwnNumber>
void for_each_row(const Subject& subject, int64_t rows, int64_t n, const Make& make,
                  const Number& number = {}) {
  constexpr int64_t kWeightsPerTask = 16384;  // some 10 us of work, well above the cost of a task
  FirstFailure failure;
  at::parallel_for(0, rows, std::max<int64_t>(1, kWeightsPerTask / n), [&](int64_t begin, int64_t end) {
    auto function = make();
    for (int64_t row = begin; row < end; ++row) {
      if (function(row) == grid::Status::kOk) continue;
      failure.record(row);
      return;
    }
  });
  if (const int64_t row = failure.row(); row >= 0) {
    const grid::Status status = make()(row);
    fail_row(subject, number(row, status), status);
  }
}

/// The rows of a latent as a grid sees them: one row of everything where the whole tensor shares its scale.
/// Called, it gives the number of the tensor's row that is at fault, for `for_each_row`.
class GridRows {
 public:
  /// latent: contiguous float32[R, ...].
  GridRows(const grid::Grid& grid, const at::Tensor& latent);

  int64_t count() const noexcept { return count_; }
  int64_t width() const noexcept { return width_; }
  int64_t operator()(int64_t row, grid::Status status) const;

 private:
  const float* w_;
  int64_t rows_;
  int64_t count_;
  int64_t width_;
};

/// The held scales of each grid row; none when a rule gives them.
class HeldRows {
 public:
  HeldRows(const grid::Grid& grid, const Scales& scales, int64_t width)
      : held_(scales.held.defined() ? scales.held.contiguous() : at::Tensor()),
        stride_(grid.blocks(width) * grid.params()) {}

  bool any() const noexcept { return held_.defined(); }
  const float* operator()(int64_t row) const { return held_.const_data_ptr<float>() + row * stride_; }

 private:
  at::Tensor held_;
  int64_t stride_;
};

/// w_hat[r] = fake_quantize(w[r]) with these scales. latent: contiguous float32[R, ...]; w_hat: contiguous
/// float32 or bfloat16 of as many elements.
void quantize_rows(const Subject& subject, const grid::Grid& grid, const Scales& scales,
                   const at::Tensor& latent, const at::Tensor& w_hat);

/// dL/dw and dL/ds of all rows from `grad`, dL/dw_hat, as grid::Grid::backward defines them; kDifferentiated
/// adds what reaches the weights through the scales. All contiguous float32; grad, latent, grad_weight:
/// [R, ...]; grad_weight may be `grad` itself; grad_scales: [R, G, P] or undefined. The gradient of scales is
/// multiplied with `factors`, float32[P], unless that is empty.
void backward_rows(const Subject& subject, const grid::Grid& grid, const Scales& scales, EstimatorKind kind,
                   const at::Tensor& grad, const at::Tensor& latent, const at::Tensor& grad_weight,
                   const at::Tensor& grad_scales = {}, const std::vector<float>& factors = {});

/// What ScaleGradient multiplies the gradient of each of the P scales of a block with; empty for 1. Where a
/// block has several scales of a name, each is shared by as many of its weights. weight: [R, ...].
std::vector<float> scale_factors(const grid::Grid& grid, ScaleGradient rule, const at::Tensor& weight);

}  // namespace qat::ops
