#include "qat/ptq/calibration.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "ptq/check.hpp"
#include "ptq/input_rows.hpp"
#include "ptq/no_autocast.hpp"

namespace qat::ptq {
namespace {

/// Columns of x^T x that are formed together; those left of them follow by symmetry.
constexpr int64_t kPanel = 192;

}  // namespace

InputMoments::InputMoments(int64_t width)
    : second_(at::zeros({width, width}, at::kDouble)), magnitude_(at::zeros({width}, at::kDouble)) {}

void InputMoments::add(const at::Tensor& input, const at::Tensor& weights) {
  const int64_t n = magnitude_.size(0);
  check_input("InputMoments", input, n);
  const at::NoGradGuard no_grad;
  const NoAutocast full_precision;
  magnitude_.add_(input_rows(input, {}).abs().sum(0, /*keepdim=*/false, at::kDouble));
  const at::Tensor x = input_rows(input, weights);
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t count = std::min(kPanel, n - first);
    second_.narrow(0, first, count)
        .narrow(1, first, n - first)
        .add_(at::mm(x.narrow(1, first, count).t(), x.narrow(1, first, n - first)));
  }
  count_ += x.size(0);
}

at::Tensor InputMoments::second() const {
  const at::Tensor upper = second_.triu();
  return (upper + upper.triu(1).t()) / static_cast<double>(std::max<int64_t>(1, count_));
}

at::Tensor InputMoments::magnitude() const {
  return magnitude_ / static_cast<double>(std::max<int64_t>(1, count_));
}

}  // namespace qat::ptq
