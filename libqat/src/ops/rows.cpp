#include "ops/rows.hpp"

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

void quantize_rows(const Subject& subject, const grid::Grid& grid, ScaleRule rule, const at::Tensor& latent,
                   const at::Tensor& w_hat) {
  const GridRows rows(grid, latent);
  const int64_t n = rows.width();
  const float* from = latent.const_data_ptr<float>();
  if (w_hat.scalar_type() == at::kFloat) {
    float* to = w_hat.mutable_data_ptr<float>();
    for_each_row(
        subject, rows.count(), n,
        [&] {
          return [&](int64_t row) { return grid.fake_quantize(from + row * n, n, to + row * n, rule); };
        },
        rows);
  } else {
    auto* to = reinterpret_cast<uint16_t*>(w_hat.mutable_data_ptr<at::BFloat16>());
    for_each_row(
        subject, rows.count(), n,
        [&] {
          return [&](int64_t row) { return grid.fake_quantize_bf16(from + row * n, n, to + row * n, rule); };
        },
        rows);
  }
}

}  // namespace qat::ops
