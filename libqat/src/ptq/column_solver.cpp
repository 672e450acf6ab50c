#include "ptq/column_solver.hpp"

#include <algorithm>

namespace qat::ptq {

using grid::Status;

ColumnSolver::ColumnSolver(const ColumnPlan& plan)
    : plan_(plan),
      chooser_(plan.grid, plan.scale, plan.n),
      work_(kRows * plan.n),
      errors_(kRows * plan.block),
      rounded_(std::max<int64_t>(1, plan.grid.info().block)) {}

ColumnSolver::Result ColumnSolver::operator()(const float* w, int64_t rows, float* latent, float* scales,
                                              int64_t row_scales) {
  const int64_t n = plan_.n;
  std::copy_n(w, rows * n, latent);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < n; ++j) work_[row * n + j] = w[row * n + plan_.order[j]];
  }
  for (int64_t first = 0; first < n; first += plan_.block) {
    const int64_t last = std::min(n, first + plan_.block);
    for (int64_t row = 0; row < rows; ++row) {
      const Status status =
          round_columns(first, last, work_.data() + row * n, errors_.data() + row * plan_.block,
                        latent + row * n, scales + row * row_scales);
      if (status != Status::kOk) return {row, status};
    }
    propagate(first, last, rows);
  }
  return {};
}

Status ColumnSolver::round_columns(int64_t first, int64_t last, double* work, double* errors, float* latent,
                                   float* s) {
  const int64_t n = plan_.n;
  const int64_t block = plan_.grid.info().block;
  for (int64_t j = first; j < last; ++j) {
    if (plan_.dynamic && j % block == 0) {
      const Status status = choose_scales(j, work, latent, s);
      if (status != Status::kOk) return status;
    }
    const int64_t column = plan_.order[j];
    latent[column] = static_cast<float>(work[j]);
    float w_hat;
    const Status status = round_one(column, latent, s, &w_hat);
    if (status != Status::kOk) return status;
    const double* row = plan_.factor + j * n;
    const double error = (work[j] - static_cast<double>(w_hat)) / row[j];
    errors[j - first] = error;
    for (int64_t k = j + 1; k < last; ++k) work[k] -= error * row[k];
  }
  return Status::kOk;
}

Status ColumnSolver::round_one(int64_t column, const float* latent, const float* s, float* w_hat) {
  const int64_t block = plan_.grid.info().block;
  // One scale for the whole row: a single weight is a row of its own.
  if (block <= 0) return plan_.grid.fake_quantize_with(latent + column, 1, s, w_hat);
  const int64_t index = column / block;
  const Status status = plan_.grid.fake_quantize_with(latent + index * block, block,
                                                      s + index * plan_.grid.params(), rounded_.data());
  *w_hat = rounded_[column - index * block];
  return status;
}

Status ColumnSolver::choose_scales(int64_t position, const double* work, float* latent, float* s) {
  const int64_t block = plan_.grid.info().block;
  const int64_t column = plan_.order[position];  // the block's first: a dynamic plan keeps blocks together
  for (int64_t k = 0; k < block; ++k) latent[column + k] = static_cast<float>(work[position + k]);
  return chooser_(latent + column, plan_.importance + column, block,
                  s + column / block * plan_.grid.params());
}

void ColumnSolver::propagate(int64_t first, int64_t last, int64_t rows) {
  const int64_t n = plan_.n;
  int64_t j = first;
  // Four columns at once: each later weight is read and written once for four products.
  for (; j + 4 <= last; j += 4) {
    const double* u = plan_.factor + j * n;
    for (int64_t row = 0; row < rows; ++row) {
      const double* e = errors_.data() + row * plan_.block + (j - first);
      double* work = work_.data() + row * n;
      for (int64_t k = last; k < n; ++k) {
        work[k] -= (e[0] * u[k] + e[1] * u[n + k]) + (e[2] * u[2 * n + k] + e[3] * u[3 * n + k]);
      }
    }
  }
  for (; j < last; ++j) {
    const double* u = plan_.factor + j * n;
    for (int64_t row = 0; row < rows; ++row) {
      const double e = errors_[row * plan_.block + (j - first)];
      for (int64_t k = last; k < n; ++k) work_[row * n + k] -= e * u[k];
    }
  }
}

}  // namespace qat::ptq
