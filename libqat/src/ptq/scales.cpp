#include "ptq/scales.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "ptq/check.hpp"
#include "qat/grid/device.hpp"
#include "qat/grid/seq.hpp"

namespace qat::ptq {
namespace {

using grid::Status;

/// One row of everything: the scale that all rows of a tensor share.
at::Tensor shared_scale(const Subject& subject, const grid::Grid& grid, ScaleChoice choice,
                        const at::Tensor& weight, const at::Tensor& importance) {
  const int64_t rows = weight.size(0), n = weight.numel();
  at::Tensor scales = at::empty({1, 1, grid.params()}, weight.options());
  const at::Tensor repeated =
      importance.defined() ? importance.expand({rows, weight.size(1)}).contiguous() : importance;
  const float* w = weight.const_data_ptr<float>();
  ScaleChooser choose(grid, choice, n);
  const Status status = choose(w, repeated.defined() ? repeated.const_data_ptr<double>() : nullptr, n,
                               scales.mutable_data_ptr<float>());
  if (status == Status::kOk) return scales;
  const int64_t width = weight.size(1);
  int64_t row = 0;
  while (row + 1 < rows && grid::all_finite(w + row * width, width)) ++row;
  fail_row(subject, row, status);
}

}  // namespace

ScaleChooser::ScaleChooser(const grid::Grid& grid, ScaleChoice choice, int64_t n)
    : grid_(grid), choice_(choice), block_(grid.block(n)) {
  if (choice.seq) {
    free_.resize(grid.blocks(n) * grid::seq_params(grid));
  } else if (choice.source == ScaleSource::kWeighted) {
    search_.emplace(grid, block_);
  }
}

Status ScaleChooser::choose_tied(const float* w, const double* importance, int64_t count, float* s) {
  const bool counts = choice_.source == ScaleSource::kWeighted &&
                      std::any_of(importance, importance + count, [](double one) { return one > 0.0; });
  const Status status = choice_.source == ScaleSource::kReference
                            ? grid::seq_start(grid_, w, count, free_.data())
                            : grid::seq_search(grid_, w, count, free_.data(), counts ? importance : nullptr);
  if (status != Status::kOk) return status;
  grid::seq_tie(grid_, free_.data(), count, s);
  return status;
}

Status ScaleChooser::operator()(const float* w, const double* importance, int64_t count, float* s) {
  if (choice_.seq) return choose_tied(w, importance, count, s);
  if (choice_.source == ScaleSource::kReference) return grid_.choose(w, count, s);
  if (choice_.source == ScaleSource::kSearch) return grid_.search(w, count, s);
  for (int64_t first = 0; first < count; first += block_, s += grid_.params()) {
    const Status status = (*search_)(w + first, importance + first, s);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

at::Tensor choose_scales(std::string_view function, std::string_view tensor, const grid::Grid& grid,
                         ScaleChoice choice, const at::Tensor& weight, const at::Tensor& importance) {
  const Subject subject{function, tensor};
  if (choice.seq && !grid::holds_seq(grid)) {
    fail(subject, "a grid that holds SEQ (" + grid::seq_names() + ")", std::string(grid.info().name));
  }
  if (grid.info().block == grid::kWholeTensor) {
    return shared_scale(subject, grid, choice, weight, importance);
  }
  const int64_t rows = weight.size(0), n = weight.size(1);
  const int64_t row_scales = grid.blocks(n) * grid.params();
  at::Tensor scales = at::empty({rows, grid.blocks(n), grid.params()}, weight.options());
  const float* w = weight.const_data_ptr<float>();
  const double* h = importance.defined() ? importance.const_data_ptr<double>() : nullptr;
  float* s = scales.mutable_data_ptr<float>();
  for_each_row(subject, rows, n, [&] {
    return [&, choose = ScaleChooser(grid, choice, n)](int64_t row) mutable {
      return choose(w + row * n, h, n, s + row * row_scales);
    };
  });
  return scales;
}

}  // namespace qat::ptq
