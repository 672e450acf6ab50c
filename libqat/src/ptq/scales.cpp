#include "ptq/scales.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "ptq/check.hpp"
#include "qat/grid/device.hpp"

namespace qat::ptq {
namespace {

using grid::Status;

/// One row of everything: the scale that all rows of a tensor share.
at::Tensor shared_scale(const Subject& subject, const grid::Grid& grid, ScaleSource source,
                        const at::Tensor& weight, const at::Tensor& importance) {
  const int64_t rows = weight.size(0), n = weight.numel();
  at::Tensor scales = at::empty({1, 1, grid.params()}, weight.options());
  const at::Tensor repeated =
      importance.defined() ? importance.expand({rows, weight.size(1)}).contiguous() : importance;
  const float* w = weight.const_data_ptr<float>();
  ScaleChooser choose(grid, source, n);
  const Status status = choose(w, repeated.defined() ? repeated.const_data_ptr<double>() : nullptr, n,
                               scales.mutable_data_ptr<float>());
  if (status == Status::kOk) return scales;
  const int64_t width = weight.size(1);
  int64_t row = 0;
  while (row + 1 < rows && grid::all_finite(w + row * width, width)) ++row;
  fail_row(subject, row, status);
}

}  // namespace

ScaleChooser::ScaleChooser(const grid::Grid& grid, ScaleSource source, int64_t n)
    : grid_(grid), source_(source), block_(grid.block(n)) {
  if (source == ScaleSource::kWeighted) search_.emplace(grid, block_);
}

Status ScaleChooser::operator()(const float* w, const double* importance, int64_t count, float* s) {
  if (source_ == ScaleSource::kReference) return grid_.choose(w, count, s);
  if (source_ == ScaleSource::kSearch) return grid_.search(w, count, s);
  for (int64_t first = 0; first < count; first += block_, s += grid_.params()) {
    const Status status = (*search_)(w + first, importance + first, s);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

at::Tensor choose_scales(std::string_view function, std::string_view tensor, const grid::Grid& grid,
                         ScaleSource source, const at::Tensor& weight, const at::Tensor& importance) {
  const Subject subject{function, tensor};
  if (grid.info().block == grid::kWholeTensor) {
    return shared_scale(subject, grid, source, weight, importance);
  }
  const int64_t rows = weight.size(0), n = weight.size(1);
  const int64_t row_scales = grid.blocks(n) * grid.params();
  at::Tensor scales = at::empty({rows, grid.blocks(n), grid.params()}, weight.options());
  const float* w = weight.const_data_ptr<float>();
  const double* h = importance.defined() ? importance.const_data_ptr<double>() : nullptr;
  float* s = scales.mutable_data_ptr<float>();
  for_each_row(subject, rows, n, [&] {
    return [&, choose = ScaleChooser(grid, source, n)](int64_t row) mutable {
      return choose(w + row * n, h, n, s + row * row_scales);
    };
  });
  return scales;
}

}  // namespace qat::ptq
