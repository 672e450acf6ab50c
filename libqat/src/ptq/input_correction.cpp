#include "qat/ptq/input_correction.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "ptq/check.hpp"
#include "ptq/input_rows.hpp"
#include "ptq/inverse_factor.hpp"
#include "ptq/no_autocast.hpp"
#include "ptq/one_thread.hpp"

namespace qat::ptq {

InputDrift::InputDrift(int64_t width) : sum_(at::zeros({width, width}, at::kFloat)) {}

void InputDrift::add(const at::Tensor& reference, const at::Tensor& input, const at::Tensor& weights) {
  check_input("InputDrift", input, sum_.size(0));
  if (reference.sizes() != input.sizes()) {
    fail({"InputDrift", "reference"}, "the shape of the input", describe(reference));
  }
  const at::NoGradGuard no_grad;
  const NoAutocast full_precision;
  const at::ScalarType dtype = input.scalar_type();
  const at::Tensor x = input_rows(input, dtype);
  at::Tensor drift = input_rows(reference, dtype) - x;
  if (weights.defined()) drift.mul_(input_factors(weights).to(dtype));
  sum_.add_(at::mm(drift.t(), x));
  count_ += x.size(0);
}

at::Tensor InputDrift::mean() const {
  return sum_.to(at::kDouble) / static_cast<double>(std::max<int64_t>(1, count_));
}

at::Tensor input_correction(const at::Tensor& hessian, const at::Tensor& drift, double share, double damping,
                            std::string_view tensor) {
  const Subject subject{"input_correction", tensor};
  const NoAutocast full_precision;
  if (!(share >= 0.0 && share <= 1.0)) fail(subject, "a share between 0 and 1", std::to_string(share));
  const int64_t n = hessian.size(0);
  const at::Tensor h = checked_statistics(subject, "hessian", hessian, {n, n});
  const at::Tensor d = checked_statistics(subject, "drift", drift, {n, n});
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  const at::Tensor factor = inverse_factor(subject, h, damping, order);
  at::Tensor correction;
  in_one_thread([&] { correction = (at::mm(at::mm(d, factor.t()), factor) * share).to(at::kFloat); });
  return correction;
}

}  // namespace qat::ptq
