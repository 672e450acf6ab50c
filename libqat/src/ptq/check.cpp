#include "ptq/check.hpp"

#include <ATen/ops/isfinite.h>

#include <sstream>

#include "qat/core/error.hpp"

namespace qat::ptq {

void check_finite(const Subject& subject, const char* what, const at::Tensor& values) {
  if (at::isfinite(values).all().item<bool>()) return;
  throw NumericError(to_string(subject) + ": expected a finite " + what + ", got NaN or infinity");
}

const grid::Grid& check_coded(const Subject& subject, const at::Tensor& weight, std::string_view grid) {
  const grid::Grid& found = grid::find(grid);
  if (found.info().is_float) fail(subject, "a grid with codes", std::string(grid));
  if (weight.scalar_type() != at::kFloat || weight.dim() < 1 || weight.numel() == 0) {
    fail(subject, "a weight of float32[R, ...]", describe(weight));
  }
  if (const int64_t n = weight.numel() / weight.size(0); !found.divides(n)) {
    fail(subject, "rows that blocks of " + std::to_string(found.info().block) + " divide", describe(weight));
  }
  return found;
}

at::Tensor checked_statistics(const Subject& subject, const char* what, const at::Tensor& value,
                              at::IntArrayRef shape) {
  const bool is_float = value.scalar_type() == at::kFloat || value.scalar_type() == at::kDouble;
  if (!is_float || value.sizes() != shape) {
    std::ostringstream expected;
    expected << "a " << what << " of float32 or float64" << shape;
    fail(subject, expected.str(), describe(value));
  }
  at::Tensor result = value.detach().to(at::kCPU, at::kDouble).contiguous();
  check_finite(subject, what, result);
  return result;
}

int64_t check_outputs(const Subject& subject, const at::Tensor& outputs, int64_t rows) {
  const bool square = outputs.dim() == 3 && outputs.size(1) == outputs.size(2) && outputs.size(1) > 0;
  const int64_t groups = square ? (rows + outputs.size(1) - 1) / outputs.size(1) : 0;
  if (!square || outputs.size(0) != groups || outputs.scalar_type() != at::kFloat) {
    fail(subject,
         "outputs float32[K, S, S] of K groups of S of the weight's " + std::to_string(rows) + " rows",
         describe(outputs));
  }
  check_finite(subject, "outputs", outputs);
  return groups;
}

at::Tensor rows_of(const at::Tensor& weight) {
  return weight.detach().to(at::kCPU).reshape({weight.size(0), -1}).contiguous();
}

}  // namespace qat::ptq
