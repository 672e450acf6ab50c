#include "qat/ptq/calibration.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "ptq/check.hpp"
#include "ptq/input_rows.hpp"
#include "ptq/no_autocast.hpp"
#include "ptq/symmetric_sums.hpp"

namespace qat::ptq {
namespace {

/// Vectors whose products are summed in float32.
constexpr int64_t kTogether = 16384;

}  // namespace

InputMoments::InputMoments(int64_t width)
    : recent_(at::zeros({width, width}, at::kFloat)),
      second_(at::zeros({width, width}, at::kDouble)),
      magnitude_(at::zeros({width}, at::kDouble)) {}

void InputMoments::add(const at::Tensor& input, const at::Tensor& weights) {
  const int64_t n = magnitude_.size(0);
  check_input("InputMoments", input, n);
  const at::NoGradGuard no_grad;
  const NoAutocast full_precision;
  const at::Tensor rows = input_rows(input);
  magnitude_.add_(rows.abs().sum(0));
  const at::Tensor x = weights.defined() ? rows * input_factors(weights).sqrt() : rows;
  add_products(recent_, x);
  count_ += x.size(0);
  recent_count_ += x.size(0);
  if (recent_count_ < kTogether) return;
  second_.add_(recent_);
  recent_.zero_();
  recent_count_ = 0;
}

at::Tensor InputMoments::second() const {
  return from_upper(second_ + recent_) / static_cast<double>(std::max<int64_t>(1, count_));
}

at::Tensor InputMoments::magnitude() const {
  return magnitude_ / static_cast<double>(std::max<int64_t>(1, count_));
}

}  // namespace qat::ptq
