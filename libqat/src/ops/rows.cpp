#include "ops/rows.hpp"

#include "qat/core/error.hpp"

namespace qat::ops {

void fail_row(const Subject& subject, int64_t row, grid::Status status) {
  throw NumericError(to_string(subject) + ": row " + std::to_string(row) + " " +
                     std::string(grid::to_string(status)));
}

void quantize_rows(const Subject& subject, const grid::Grid& grid, ScaleRule rule, const at::Tensor& latent,
                   const at::Tensor& w_hat) {
  const int64_t rows = latent.size(0);
  const int64_t n = latent.numel() / rows;
  const float* from = latent.const_data_ptr<float>();
  if (w_hat.scalar_type() == at::kFloat) {
    float* to = w_hat.mutable_data_ptr<float>();
    for_each_row(subject, rows, n, [&] {
      return [&](int64_t row) { return grid.fake_quantize(from + row * n, n, to + row * n, rule); };
    });
  } else {
    auto* to = reinterpret_cast<uint16_t*>(w_hat.mutable_data_ptr<at::BFloat16>());
    for_each_row(subject, rows, n, [&] {
      return [&](int64_t row) { return grid.fake_quantize_bf16(from + row * n, n, to + row * n, rule); };
    });
  }
}

}  // namespace qat::ops
