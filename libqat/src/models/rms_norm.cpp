#include "rms_norm.hpp"

#include <ATen/ops/ones.h>

#include "fused.hpp"

namespace qat::models {

RmsNormImpl::RmsNormImpl(int64_t size, double eps) : size_(size), eps_(eps) {
  RmsNormImpl::reset();
}

void RmsNormImpl::reset() {
  weight = register_parameter("weight", at::ones({size_}, at::kFloat));
}

at::Tensor RmsNormImpl::forward(const at::Tensor& x, at::ScalarType dtype) {
  return rms_norm(x, weight, eps_, dtype);
}

}  // namespace qat::models
