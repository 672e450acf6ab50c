#include "ptq/coupled_rows.hpp"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <vector>

#include "ptq/row_ops.hpp"
#include "ptq/row_refiner.hpp"

namespace qat::ptq {
namespace {

using grid::Status;

/// Rows whose sums over the group are formed together, by one matrix product.
constexpr int64_t kChunk = 16;

/// float32[R, N] = (W - W^) H.
RowStatus weigh_errors(const CoupledRows& rows, at::Tensor* h_errors) {
  const int64_t count = rows.weight.size(0), n = rows.weight.size(1);
  const int64_t row_scales = rows.scales.numel() / count;
  at::Tensor errors = at::empty_like(rows.weight);
  const float* w = rows.weight.const_data_ptr<float>();
  const float* latent = rows.latent.const_data_ptr<float>();
  const float* scales = rows.scales.const_data_ptr<float>();
  float* error = errors.mutable_data_ptr<float>();
  for (int64_t r = 0; r < count; ++r, w += n, latent += n, error += n) {
    const Status status = rows.grid.fake_quantize_with(latent, n, scales + r * row_scales, error);
    if (status != Status::kOk) return {status, r};
    for (int64_t i = 0; i < n; ++i) error[i] = w[i] - error[i];
  }
  *h_errors = at::mm(errors, rows.hessian);
  return {};
}

/// One sweep over the rows of a group.
class Sweep {
 public:
  Sweep(const CoupledRows& rows, at::Tensor h_errors)
      : rows_(rows),
        h_errors_(std::move(h_errors)),
        refine_(rows.grid, rows.hessian.const_data_ptr<float>(), rows.weight.size(1), /*sweeps=*/1,
                rows.hold_scales),
        before_(rows.weight.size(1)) {}

  RowStatus operator()() {
    const int64_t count = rows_.weight.size(0);
    for (int64_t first = 0; first < count; first += kChunk) {
      const int64_t rows = std::min(kChunk, count - first);
      sums_ = at::mm(rows_.outputs.narrow(0, first, rows), h_errors_);
      for (int64_t i = 0; i < rows; ++i) {
        const Status status = move_row(first, i, rows);
        if (status != Status::kOk) return {status, first + i};
      }
    }
    return {};
  }

 private:
  /// Row first + i against all others. sums_ are those of the chunk's rows, sum_s G_rs (H e_s).
  Status move_row(int64_t first, int64_t i, int64_t rows) {
    const int64_t n = rows_.weight.size(1), count = rows_.weight.size(0), r = first + i;
    const float* curvature = rows_.outputs.const_data_ptr<float>() + r * count;
    float* sum = sums_.mutable_data_ptr<float>() + i * n;
    for (int64_t k = 0; k < n; ++k) sum[k] /= curvature[r];
    std::copy_n(sum, n, before_.begin());
    const int64_t row_scales = rows_.scales.numel() / count;
    const Status status = refine_(rows_.weight.const_data_ptr<float>() + r * n, sum,
                                  rows_.latent.mutable_data_ptr<float>() + r * n,
                                  rows_.scales.mutable_data_ptr<float>() + r * row_scales);
    if (status != Status::kOk) return status;
    for (int64_t k = 0; k < n; ++k) before_[k] = sum[k] - before_[k];  // what became of H e_r
    add_scaled(before_.data(), n, 1.0F, h_errors_.mutable_data_ptr<float>() + r * n);
    for (int64_t later = i + 1; later < rows; ++later) {
      add_scaled(before_.data(), n, curvature[first + later], sums_.mutable_data_ptr<float>() + later * n);
    }
    return Status::kOk;
  }

  const CoupledRows& rows_;
  at::Tensor h_errors_;  ///< float32[R, N]: H e of each row as it is
  at::Tensor sums_;
  RowRefiner refine_;
  std::vector<float> before_;
};

}  // namespace

RowStatus refine_together(const CoupledRows& rows, int64_t sweeps) {
  for (int64_t i = 0; i < sweeps; ++i) {
    at::Tensor h_errors;  // formed anew in every sweep, so that rounding does not add up
    RowStatus status = weigh_errors(rows, &h_errors);
    if (status.status == Status::kOk) status = Sweep(rows, std::move(h_errors))();
    if (status.status != Status::kOk) return status;
  }
  return {};
}

}  // namespace qat::ptq
