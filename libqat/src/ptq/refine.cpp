#include "qat/ptq/refine.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "ptq/check.hpp"
#include "ptq/coupled_rows.hpp"
#include "ptq/no_autocast.hpp"
#include "ptq/one_thread.hpp"
#include "ptq/row_ops.hpp"
#include "ptq/row_refiner.hpp"

namespace qat::ptq {
namespace {

constexpr int kMostLevels = 16;
/// Rows whose products with the hessian are formed together, while its lines are in the cache.
constexpr int64_t kRows = 16;

bool refinable(const grid::Grid& grid, const RefineOptions& options) {
  const grid::Info& info = grid.info();
  return options.sweeps > 0 && info.block != grid::kWholeTensor &&
         info.code_max - info.code_min < kMostLevels;
}

/// float32[N, N] with the damping on its diagonal.
at::Tensor damped(const at::Tensor& hessian, double damping) {
  at::Tensor h = hessian.clone();
  const at::Tensor diagonal = h.diagonal();
  const at::Tensor used = diagonal.gt(0);
  const double count = used.sum().item<double>();
  if (count > 0) diagonal.add_(used, damping * diagonal.clamp_min(0).sum().item<double>() / count);
  return h.to(at::kFloat).contiguous();
}

struct Problem {
  const grid::Grid& grid;
  const float* hessian;
  int64_t n;
  int64_t row_scales;
  int64_t sweeps;
  bool hold_scales;
};

/// to[r] = H (w[r] - w_hat[r]) of `count` rows.
grid::Status weigh_errors(const Problem& problem, int64_t count, const float* w, const float* latent,
                          const float* scales, std::vector<float>& errors, std::vector<float>& to) {
  const int64_t n = problem.n;
  for (int64_t r = 0; r < count; ++r) {
    float* error = errors.data() + r * n;
    const grid::Status status =
        problem.grid.fake_quantize_with(latent + r * n, n, scales + r * problem.row_scales, error);
    if (status != grid::Status::kOk) return status;
    for (int64_t i = 0; i < n; ++i) error[i] = w[r * n + i] - error[i];
  }
  std::fill(to.begin(), to.end(), 0.0F);
  for (int64_t k = 0; k < n; ++k) {
    const float* h = problem.hessian + k * n;
    for (int64_t r = 0; r < count; ++r) add_scaled(h, n, errors[r * n + k], to.data() + r * n);
  }
  return grid::Status::kOk;
}

/// The rows from `first` on; returns the first that fails, or -1.
int64_t refine_rows(const Problem& problem, int64_t first, int64_t count, const float* w, float* latent,
                    float* scales, grid::Status* status) {
  const int64_t n = problem.n;
  std::vector<float> errors(count * n), h_errors(count * n);
  const float* from = w + first * n;
  float* to = latent + first * n;
  float* s = scales + first * problem.row_scales;
  *status = weigh_errors(problem, count, from, to, s, errors, h_errors);
  if (*status != grid::Status::kOk) return first;
  RowRefiner refine(problem.grid, problem.hessian, n, problem.sweeps, problem.hold_scales);
  for (int64_t r = 0; r < count; ++r) {
    *status = refine(from + r * n, h_errors.data() + r * n, to + r * n, s + r * problem.row_scales);
    if (*status != grid::Status::kOk) return first + r;
  }
  return -1;
}

void check_start(const Subject& subject, const grid::Grid& grid, const at::Tensor& rows,
                 const Solution& start) {
  const int64_t blocks = grid.blocks(rows.size(1));
  const std::vector<int64_t> expected{grid.scale_rows(rows.size(0)), blocks, grid.params()};
  if (!start.latent.defined() || start.latent.numel() != rows.numel() ||
      start.latent.scalar_type() != at::kFloat) {
    fail(subject, "a start with latents of the weight's shape",
         start.latent.defined() ? describe(start.latent) : "none");
  }
  if (!start.scales.defined() || start.scales.sizes() != at::IntArrayRef(expected) ||
      start.scales.scalar_type() != at::kFloat) {
    fail(subject, "a start with the grid's scales", start.scales.defined() ? describe(start.scales) : "none");
  }
}

/// float32[count, count] of the group, with the damping on its diagonal; the identity where nothing counts.
at::Tensor damped_outputs(const at::Tensor& group, int64_t count, double damping) {
  at::Tensor g = group.narrow(0, 0, count).narrow(1, 0, count).cpu().clone(at::MemoryFormat::Contiguous);
  const double mean = g.diagonal().clamp_min(0).mean(at::kDouble).item<double>();
  if (!(mean > 0)) return at::eye(count, g.options());
  // Rounding can leave a little less than nothing.
  g.diagonal().clamp_min_(0).add_(std::max(damping, 1e-6) * mean);
  return g;
}

/// Rows against each other, group by group.
void refine_groups(const Subject& subject, const CoupledRows& all, const at::Tensor& outputs,
                   const RefineOptions& options) {
  const int64_t rows = all.weight.size(0), size = outputs.size(1);
  FirstFailure failure;
  std::vector<RowStatus> found(check_outputs(subject, outputs, rows));
  in_one_thread_each(outputs.size(0), [&](int64_t group) {
    const int64_t first = group * size, count = std::min(size, rows - first);
    const CoupledRows part{all.grid,
                           all.hessian,
                           damped_outputs(outputs[group], count, options.output_damping),
                           all.weight.narrow(0, first, count),
                           all.latent.narrow(0, first, count),
                           all.scales.narrow(0, first, count),
                           options.hold_scales};
    found[group] = refine_together(part, options.sweeps);
    if (found[group].status != grid::Status::kOk) failure.record(group);
  });
  if (const int64_t group = failure.row(); group >= 0) {
    fail_row(subject, group * size + found[group].row, found[group].status);
  }
}

/// Each row for itself.
void refine_alone(const Subject& subject, const CoupledRows& all, const RefineOptions& options) {
  const int64_t count = all.weight.size(0);
  const Problem problem{all.grid,           all.hessian.const_data_ptr<float>(),
                        all.weight.size(1), all.scales.numel() / count,
                        options.sweeps,     options.hold_scales};
  const float* w = all.weight.const_data_ptr<float>();
  float* latents = all.latent.mutable_data_ptr<float>();
  float* s = all.scales.mutable_data_ptr<float>();
  FirstFailure failure;
  const auto solve_chunk = [&](int64_t chunk, grid::Status* status) {
    const int64_t first = chunk * kRows;
    return refine_rows(problem, first, std::min(kRows, count - first), w, latents, s, status);
  };
  at::parallel_for(0, (count + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    grid::Status status = grid::Status::kOk;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (solve_chunk(chunk, &status) >= 0) return failure.record(chunk);
    }
  });
  if (const int64_t chunk = failure.row(); chunk >= 0) {
    grid::Status status = grid::Status::kOk;
    const int64_t row = solve_chunk(chunk, &status);
    fail_row(subject, row, status);
  }
}

void check_options(const Subject& subject, const RefineOptions& options) {
  for (const double damping : {options.damping, options.output_damping}) {
    if (!(damping >= 0.0) || !std::isfinite(damping)) {
      fail(subject, "damping of at least 0", std::to_string(damping));
    }
  }
  if (options.sweeps < 0) fail(subject, "sweeps of at least 0", std::to_string(options.sweeps));
}

}  // namespace

Solution refine(const at::Tensor& weight, const at::Tensor& hessian, std::string_view grid,
                const Solution& start, const RefineOptions& options, std::string_view tensor) {
  const Subject subject{"refine", tensor};
  const NoAutocast full_precision;
  const grid::Grid& found = check_coded(subject, weight, grid);
  check_options(subject, options);
  const at::Tensor rows = rows_of(weight);
  check_finite(subject, "weight", rows);
  check_start(subject, found, rows, start);
  if (options.outputs.defined()) check_outputs(subject, options.outputs, rows.size(0));
  if (!refinable(found, options)) return start;
  const int64_t n = rows.size(1);
  const CoupledRows all{found,
                        damped(checked_statistics(subject, "hessian", hessian, {n, n}), options.damping),
                        {},
                        rows,
                        rows_of(start.latent).clone(),
                        start.scales.detach().cpu().clone(at::MemoryFormat::Contiguous),
                        options.hold_scales};
  if (options.outputs.defined()) {
    refine_groups(subject, all, options.outputs, options);
  } else {
    refine_alone(subject, all, options);
  }
  return {all.latent.view(weight.sizes()).to(weight.device()), all.scales.to(weight.device())};
}

}  // namespace qat::ptq
