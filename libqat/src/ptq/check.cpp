#include "ptq/check.hpp"

#include <ATen/ops/isfinite.h>

#include <sstream>

#include "qat/core/error.hpp"

namespace qat::ptq {

std::string to_string(const Subject& subject) {
  return std::string(subject.function) + ": " +
         (subject.tensor.empty() ? "weight" : std::string(subject.tensor));
}

void fail(const Subject& subject, const std::string& expected, const std::string& got) {
  throw ArgumentError(to_string(subject) + ": expected " + expected + ", got " + got);
}

void fail_row(const Subject& subject, int64_t row, grid::Status status) {
  throw NumericError(to_string(subject) + ": row " + std::to_string(row) + " " +
                     std::string(grid::to_string(status)));
}

void check_finite(const Subject& subject, const char* what, const at::Tensor& values) {
  if (at::isfinite(values).all().item<bool>()) return;
  throw NumericError(to_string(subject) + ": expected a finite " + what + ", got NaN or infinity");
}

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << tensor.sizes();
  return text.str();
}

const grid::Grid& check_weight(const Subject& subject, const at::Tensor& weight, std::string_view grid) {
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

at::Tensor rows_of(const at::Tensor& weight) {
  return weight.detach().to(at::kCPU).reshape({weight.size(0), -1}).contiguous();
}

}  // namespace qat::ptq
