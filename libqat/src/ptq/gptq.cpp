#include "qat/ptq/gptq.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "ptq/check.hpp"
#include "ptq/column_solver.hpp"
#include "ptq/inverse_factor.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/seq.hpp"
#include "qat/ptq/refine.hpp"

namespace qat::ptq {
namespace {

void check_options(const Subject& subject, const grid::Grid& grid, const GptqOptions& options) {
  if (!(options.damping >= 0.0) || !std::isfinite(options.damping)) {
    fail(subject, "damping of at least 0", std::to_string(options.damping));
  }
  if (options.block < 1) fail(subject, "block of at least 1", std::to_string(options.block));
  if (options.seq && !grid::holds_seq(grid)) {
    fail(subject, "a grid that holds SEQ (" + grid::seq_names() + ")", std::string(grid.info().name));
  }
}

/// Scales that are chosen on the way belong to blocks within a row.
bool is_dynamic(const grid::Grid& grid, const GptqOptions& options) {
  return grid.info().block > 0 && !options.static_scales;
}

/// The columns in groups of `group` that stay together, those with the largest diagonal first.
std::vector<int64_t> falling_order(const std::vector<double>& diagonal, int64_t group) {
  const auto n = static_cast<int64_t>(diagonal.size());
  std::vector<double> sums(n / group);
  for (int64_t i = 0; i < n; ++i) sums[i / group] += diagonal[i];
  std::vector<int64_t> groups(n / group);
  std::iota(groups.begin(), groups.end(), 0);
  std::stable_sort(groups.begin(), groups.end(), [&](int64_t a, int64_t b) { return sums[a] > sums[b]; });
  std::vector<int64_t> order;
  for (const int64_t first : groups) {
    for (int64_t i = 0; i < group; ++i) order.push_back(first * group + i);
  }
  return order;
}

std::vector<int64_t> rounding_order(const grid::Grid& grid, const GptqOptions& options,
                                    const std::vector<double>& diagonal) {
  if (options.act_order) return falling_order(diagonal, is_dynamic(grid, options) ? grid.info().block : 1);
  std::vector<int64_t> order(diagonal.size());
  std::iota(order.begin(), order.end(), 0);
  return order;
}

void solve(const Subject& subject, const ColumnPlan& plan, const at::Tensor& weight,
           const Solution& solution) {
  const int64_t rows = weight.size(0);
  const int64_t row_scales = solution.scales.size(0) == rows ? solution.scales.numel() / rows : 0;
  const bool shared = plan.grid.info().block == grid::kWholeTensor;
  const float* w = weight.const_data_ptr<float>();
  float* latent = solution.latent.mutable_data_ptr<float>();
  float* scales = solution.scales.mutable_data_ptr<float>();
  FirstFailure failure;
  const auto solve_chunk = [&](ColumnSolver& solver, int64_t chunk) {
    const int64_t row = chunk * ColumnSolver::kRows;
    ColumnSolver::Result result =
        solver(w + row * plan.n, std::min(ColumnSolver::kRows, rows - row), latent + row * plan.n,
               scales + (shared ? 0 : row * row_scales), shared ? 0 : row_scales);
    result.row += row;
    return result;
  };
  const int64_t chunks = (rows + ColumnSolver::kRows - 1) / ColumnSolver::kRows;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    ColumnSolver solver(plan);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (solve_chunk(solver, chunk).status != grid::Status::kOk) return failure.record(chunk);
    }
  });
  if (const int64_t chunk = failure.row(); chunk >= 0) {
    ColumnSolver solver(plan);
    const ColumnSolver::Result result = solve_chunk(solver, chunk);
    fail_row(subject, result.row, result.status);
  }
}

}  // namespace

std::string_view to_string(ScaleSource source) noexcept {
  switch (source) {
    case ScaleSource::kReference:
      return "reference";
    case ScaleSource::kSearch:
      return "search";
    case ScaleSource::kWeighted:
      return "weighted";
  }
  return "?";
}

ScaleSource scale_source(std::string_view name) {
  for (const ScaleSource source : {ScaleSource::kReference, ScaleSource::kSearch, ScaleSource::kWeighted}) {
    if (to_string(source) == name) return source;
  }
  throw ArgumentError("scale_source: expected one of reference, search, weighted, got \"" +
                      std::string(name) + "\"");
}

Solution gptq(const at::Tensor& weight, const at::Tensor& hessian, std::string_view grid,
              const GptqOptions& options, std::string_view tensor) {
  const Subject subject{"gptq", tensor};
  const grid::Grid& found = check_coded(subject, weight, grid);
  check_options(subject, found, options);
  const at::Tensor rows = rows_of(weight);
  check_finite(subject, "weight", rows);
  const int64_t n = rows.size(1);
  const at::Tensor h = checked_statistics(subject, "hessian", hessian, {n, n});
  const at::Tensor importance = h.diagonal().clamp_min(0.0).contiguous();
  const double* diagonal = importance.const_data_ptr<double>();
  ColumnPlan plan{.grid = found,
                  .n = n,
                  .order = rounding_order(found, options, {diagonal, diagonal + n}),
                  .factor = nullptr,
                  .block = options.block,
                  .scale = {options.scale, options.seq},
                  .importance = diagonal,
                  .dynamic = is_dynamic(found, options)};
  if (const int64_t group = found.info().block; group > 0)
    plan.block = (plan.block + group - 1) / group * group;
  const at::Tensor factor = inverse_factor(subject, h, options.damping, plan.order);
  plan.factor = factor.const_data_ptr<double>();
  Solution solution{at::empty_like(rows), {}};
  solution.scales = plan.dynamic ? at::empty({rows.size(0), found.blocks(n), found.params()}, rows.options())
                                 : choose_scales("gptq", tensor, found, plan.scale, rows, importance);
  solve(subject, plan, rows, solution);
  if (options.sweeps > 0) {
    const RefineOptions further{.damping = options.damping,
                                .sweeps = options.sweeps,
                                .hold_scales = options.seq,
                                .outputs = options.outputs,
                                .output_damping = options.output_damping};
    solution = refine(rows, h, grid, solution, further, tensor);
  }
  return {solution.latent.view(weight.sizes()).to(weight.device()), solution.scales.to(weight.device())};
}

}  // namespace qat::ptq
