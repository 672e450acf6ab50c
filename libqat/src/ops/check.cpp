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

c10::SymInt block_count(const grid::Grid& grid, const c10::SymInt& n) {
  return grid.info().block > 0 ? n / grid.info().block : c10::SymInt(1);
}

std::array<c10::SymInt, 3> scale_sizes(const grid::Grid& grid, const c10::SymInt& rows,
                                       const c10::SymInt& n) {
  const bool shared = grid.info().block == grid::kWholeTensor;
  return {shared ? c10::SymInt(1) : rows, block_count(grid, n), grid.params()};
}

Scales check_scales(const Subject& subject, const grid::Grid& grid, const at::Tensor& weight,
                    std::string_view scale, const std::optional<at::Tensor>& scales) {
  const ScaleRule rule = scale_rule(scale);
  if (rule == ScaleRule::kDifferentiated && !grid.rule_has_gradient()) {
    throw UnsupportedError(to_string(subject) + ": expected a grid whose scale rule has a gradient, got " +
                           std::string(grid.info().name));
  }
  if (rule == ScaleRule::kSeq) {
    fail(subject, "the rule learned, with the scales that seq_tie gives", "\"seq\"");
  }
  const bool given = scales && scales->defined();
  const bool expected = rule == ScaleRule::kLearned && grid.params() > 0;
  if (given != expected) {
    fail(subject, "scales exactly when the scale rule is learned and the grid has scales",
         std::string(given ? "scales" : "none") + " with " + std::string(scale) + " on " +
             std::string(grid.info().name));
  }
  if (!given) return {rule, {}};
  const std::array<c10::SymInt, 3> sizes = scale_sizes(grid, weight.sym_size(0), row_size(weight));
  if (scales->scalar_type() != at::kFloat || scales->sym_sizes() != c10::SymIntArrayRef(sizes) ||
      scales->device() != weight.device()) {
    std::ostringstream text;
    text << "scales of float32" << c10::SymIntArrayRef(sizes) << " on " << weight.device();
    fail(subject, text.str(), describe(*scales) + " on " + scales->device().str());
  }
  return {rule, *scales};
}

std::optional<at::Tensor> on_cpu(const std::optional<at::Tensor>& scales) {
  return scales ? std::optional(scales->cpu()) : std::nullopt;
}

bool is_identity(std::string_view estimator, std::string_view scale) {
  return estimator_kind(estimator) == EstimatorKind::kSte && scale_rule(scale) != ScaleRule::kDifferentiated;
}

bool is_identity(const Estimator& estimator, const grid::Grid& grid) {
  return grid.info().is_float || is_identity(to_string(estimator.kind), to_string(estimator.scale));
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
