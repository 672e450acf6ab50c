#include "ptq/inverse_factor.hpp"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>

#include "ptq/one_thread.hpp"
#include "qat/core/error.hpp"

namespace qat::ptq {
namespace {

/// The mean of the diagonal's entries above zero; 1 when there are none.
double mean_of_live(const double* h, int64_t n) {
  double sum = 0.0;
  int64_t live = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(h[i * n + i] > 0.0)) continue;
    sum += h[i * n + i];
    ++live;
  }
  return live > 0 ? sum / static_cast<double>(live) : 1.0;
}

/// H damped, in the reverse of `order`.
at::Tensor damped_and_reversed(const at::Tensor& hessian, double damping, const std::vector<int64_t>& order) {
  const int64_t n = hessian.size(0);
  const double* h = hessian.const_data_ptr<double>();
  const double mean = mean_of_live(h, n);
  at::Tensor result = at::empty_like(hessian);
  double* to = result.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    const double* row = h + order[n - 1 - i] * n;
    for (int64_t j = 0; j < n; ++j) to[i * n + j] = row[order[n - 1 - j]];
    double& diagonal = to[i * n + i];
    diagonal = (diagonal > 0.0 ? diagonal : mean) + damping * mean;
  }
  return result;
}

}  // namespace

at::Tensor inverse_factor(const Subject& subject, const at::Tensor& hessian, double damping,
                          const std::vector<int64_t>& order) {
  // With J the reversal of the order and J H J = L L^T, H = R R^T for the upper triangular R = J L J, and
  // U = R^-1: one factorisation, and no inverse of H that would have to be factorised again.
  const at::Tensor reversed = damped_and_reversed(hessian, damping, order);
  at::Tensor factor;
  int failed = 0;
  in_one_thread([&] {
    const auto [lower, info] = at::linalg_cholesky_ex(reversed);
    failed = info.item<int>();
    if (failed != 0) return;
    const at::Tensor upper = lower.flip({0, 1});
    factor = at::linalg_solve_triangular(upper, at::eye(hessian.size(0), hessian.options()), /*upper=*/true)
                 .contiguous();
  });
  if (failed != 0) {
    throw NumericError(to_string(subject) + ": expected a hessian that is positive definite with damping " +
                       std::to_string(damping) + ", got one that is not; raise the damping");
  }
  check_finite(subject, "inverse of the hessian", factor);
  return factor;
}

}  // namespace qat::ptq
