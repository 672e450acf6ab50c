#include "rms_norm.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>

#include "fused.hpp"

namespace qat::models {
namespace {

/// As the kernels take it: float32, or float64.
at::Tensor widened(const at::Tensor& x) {
  return x.to(at::promote_types(x.scalar_type(), at::kFloat));
}

}  // namespace

RmsNormImpl::RmsNormImpl(int64_t size, double eps, double offset) : size_(size), eps_(eps), offset_(offset) {
  RmsNormImpl::reset();
}

void RmsNormImpl::reset() {
  weight = register_parameter("weight", at::full({size_}, 1.0 - offset_, at::kFloat));
}

at::Tensor RmsNormImpl::forward(const at::Tensor& x, at::ScalarType dtype) {
  return rms_norm(widened(x), offset_ == 0.0 ? weight : widened(weight) + offset_, eps_, dtype);
}

at::Tensor plain_rms_norm(const at::Tensor& x, double eps, at::ScalarType dtype) {
  const at::Tensor wide = widened(x);
  return rms_norm(wide, at::ones({x.size(-1)}, wide.options()), eps, dtype);
}

}  // namespace qat::models
