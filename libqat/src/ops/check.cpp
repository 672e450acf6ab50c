#include "ops/check.hpp"

#include <sstream>

#include "qat/core/error.hpp"

namespace qat::ops {

std::string to_string(const Subject& subject) {
  return std::string(subject.op) + ": " + (subject.tensor.empty() ? "weight" : std::string(subject.tensor));
}

void fail(const Subject& subject, const std::string& expected, const std::string& got) {
  throw ArgumentError(to_string(subject) + ": expected " + expected + ", got " + got);
}

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << tensor.sym_sizes();
  return text.str();
}

c10::SymInt row_size(const at::Tensor& weight) {
  c10::SymInt n = 1;
  for (const c10::SymInt& size : weight.sym_sizes().slice(1)) n = n * size;
  return n;
}

const grid::Grid& check_weight(const Subject& subject, const at::Tensor& weight, std::string_view grid_name) {
  const grid::Grid& grid = grid::find(grid_name);
  if (weight.scalar_type() != at::kFloat || weight.layout() != at::kStrided || weight.dim() < 2) {
    fail(subject, "a float32 latent of at least 2 dimensions", describe(weight));
  }
  const c10::SymInt n = row_size(weight);
  if ((weight.sym_size(0) * n).sym_eq(0).guard_bool(__FILE__, __LINE__)) {
    fail(subject, "at least one weight", describe(weight));
  }
  const int64_t block = grid.info().block;
  if (block > 0 && (n % block).sym_ne(0).guard_bool(__FILE__, __LINE__)) {
    fail(subject, "rows that blocks of " + std::to_string(block) + " (" + std::string(grid_name) + ") divide",
         describe(weight));
  }
  return grid;
}

const grid::Grid& check_matrix(const Subject& subject, const at::Tensor& weight, std::string_view grid_name) {
  if (weight.dim() != 2) fail(subject, "a float32 latent of 2 dimensions", describe(weight));
  return check_weight(subject, weight, grid_name);
}

void check_activation(const Subject& subject, const char* what, const at::Tensor& value,
                      const c10::SymInt& last, const at::Tensor& weight) {
  const at::ScalarType dtype = value.scalar_type();
  const bool floating = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!floating || value.dim() == 0 || value.sym_size(-1).sym_ne(last).guard_bool(__FILE__, __LINE__)) {
    std::ostringstream expected;
    expected << what << " of float32, bfloat16 or float16 with a last dimension of " << last;
    fail(subject, expected.str(), describe(value));
  }
  if (value.device() != weight.device()) {
    fail(subject, std::string(what) + " on the weight's device " + weight.device().str(),
         value.device().str());
  }
}

void check_like_weight(const Subject& subject, const char* what, const at::Tensor& value,
                       const at::Tensor& weight) {
  if (value.scalar_type() != at::kFloat || value.sym_sizes() != weight.sym_sizes() ||
      value.device() != weight.device()) {
    fail(subject, std::string(what) + " like the weight " + describe(weight) + " on " + weight.device().str(),
         describe(value) + " on " + value.device().str());
  }
}

}  // namespace qat::ops
