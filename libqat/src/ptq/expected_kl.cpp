#include "qat/ptq/expected_kl.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <string>

#include "ptq/check.hpp"
#include "ptq/no_autocast.hpp"

namespace qat::ptq {
namespace {

void check(const at::Tensor& errors, const at::Tensor& hessian, const at::Tensor& outputs) {
  if (errors.dim() != 2 || !errors.is_floating_point()) {
    fail({"expected_kl", "errors"}, "float32[R, N]", describe(errors));
  }
  const int64_t n = errors.size(1);
  if (hessian.sizes() != at::IntArrayRef({n, n})) {
    fail({"expected_kl", "hessian"}, std::to_string(n) + " rows and columns", describe(hessian));
  }
  check_outputs({"expected_kl", "outputs"}, outputs, errors.size(0));
}

}  // namespace

double expected_kl(const at::Tensor& errors, const at::Tensor& hessian, const at::Tensor& outputs) {
  check(errors, hessian, outputs);
  const at::NoGradGuard no_grad;
  const NoAutocast full_precision;
  const at::Tensor e = errors.to(at::kCPU, at::kFloat), g = outputs.to(at::kCPU, at::kFloat);
  const at::Tensor weighted = at::mm(e, hessian.to(at::kCPU, at::kFloat));
  const int64_t size = g.size(1);
  double sum = 0.0;
  for (int64_t k = 0; k < g.size(0); ++k) {
    const int64_t first = k * size, count = std::min(size, e.size(0) - first);
    const at::Tensor together = at::mm(weighted.narrow(0, first, count), e.narrow(0, first, count).t());
    const at::Tensor group = g[k].narrow(0, 0, count).narrow(1, 0, count);
    sum += (together * group).sum(at::kDouble).item<double>();
  }
  return std::max(0.0, sum / 2);
}

}  // namespace qat::ptq
