#include "qat/ops/quantized_embedding.hpp"

#include <ATen/ops/_unique2.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "ops/check.hpp"
#include "ops/embedding_operators.hpp"
#include "ops/rows.hpp"
#include "qat/ops/fake_quantize.hpp"

namespace qat::ops {
namespace {

using namespace embedding;

/// The checked arguments of an operator.
struct Table {
  const grid::Grid& grid;
  Estimator estimator;
  Scales scales;

  bool shares_scale() const { return grid.info().block == grid::kWholeTensor; }
};

Table check_lookup(const Subject& subject, const at::Tensor& indices, const at::Tensor& weight,
                   int64_t padding_idx, string_view grid, string_view estimator, string_view scale,
                   const OptionalTensor& scales, string_view gradient_rule) {
  const Estimator rules{estimator_kind(estimator), scale_rule(scale), scale_gradient(gradient_rule)};
  const grid::Grid& found = check_matrix(subject, weight, grid);
  if (indices.scalar_type() != at::kLong) fail(subject, "indices of int64", describe(indices));
  if (weight.sym_size(0).sym_le(padding_idx).guard_bool(__FILE__, __LINE__)) {
    fail(subject, "padding_idx below the number of rows of " + describe(weight), std::to_string(padding_idx));
  }
  return {found, rules, check_scales(subject, found, weight, scale, scales)};
}

Table check_backward(const Subject& subject, const at::Tensor& grad_output, const at::Tensor& indices,
                     const at::Tensor& weight, int64_t padding_idx, string_view grid, string_view estimator,
                     string_view scale, const OptionalTensor& scales, string_view gradient_rule) {
  Table table =
      check_lookup(subject, indices, weight, padding_idx, grid, estimator, scale, scales, gradient_rule);
  check_activation(subject, "grad_output", grad_output, weight.sym_size(1), weight);
  return table;
}

/// The rows that a batch touches.
struct Touched {
  at::Tensor rows;      ///< int64[U] on the CPU, ascending
  at::Tensor position;  ///< int64[...], shaped like the indices: where in `rows` each index is
};

Touched touched_rows(const Subject& subject, const at::Tensor& indices, int64_t row_count) {
  auto [rows, position, counts] = at::_unique2(indices.cpu(), /*sorted=*/true, /*return_inverse=*/true);
  if (rows.numel() > 0) {
    const int64_t* first = rows.const_data_ptr<int64_t>();
    const int64_t last = first[rows.numel() - 1];
    if (*first < 0 || last >= row_count) {
      fail(subject, "indices in [0, " + std::to_string(row_count) + ")",
           std::to_string(*first < 0 ? *first : last));
    }
  }
  return {rows, position};
}

/// [indices..., N] from a table of the touched rows.
at::Tensor look_up(const at::Tensor& table, const at::Tensor& position) {
  std::vector<int64_t> sizes = position.sizes().vec();
  sizes.push_back(table.size(1));
  return table.index_select(0, position.flatten()).view(sizes);
}

/// The scales that the rule gives to a grid with one for the whole tensor, which all of `latent` decides. An
/// error names the row at fault.
at::Tensor shared_scale(const Subject& subject, const grid::Grid& grid, ScaleRule rule,
                        const at::Tensor& latent) {
  const at::Tensor s = at::empty({1, 1, grid.params()}, latent.options());
  const float* w = latent.const_data_ptr<float>();
  float* to = s.mutable_data_ptr<float>();
  std::array<float, grid::kMaxParams> stored{};
  const auto choose = [&](int64_t) {
    const grid::Status status = grid.scales(rule, w, latent.numel(), to);
    return status == grid::Status::kOk ? grid.store(to, latent.numel(), stored.data()) : status;
  };
  for_each_row(subject, 1, latent.numel(), [&] { return choose; }, GridRows(grid, latent));
  return s;
}

at::Tensor forward_cpu(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                       string_view grid_name, string_view estimator, string_view scale, string_view tensor,
                       const OptionalTensor& scales, string_view gradient_rule) {
  const Subject subject{"quantized_embedding", tensor};
  const Table table =
      check_lookup(subject, indices, weight, padding_idx, grid_name, estimator, scale, scales, gradient_rule);
  const grid::Grid& grid = table.grid;
  const Touched touched = touched_rows(subject, indices, weight.size(0));
  const at::Tensor latent = weight.contiguous();
  const int64_t n = latent.size(1);
  Scales source = table.scales;
  if (table.shares_scale() && !source.held.defined()) {
    source.held = shared_scale(subject, grid, source.rule, latent);
  }
  const HeldRows held(grid, source, n);
  const at::Tensor values = at::empty({touched.rows.numel(), n}, latent.options());
  const float* w = latent.const_data_ptr<float>();
  const int64_t* rows = touched.rows.const_data_ptr<int64_t>();
  float* w_hat = values.mutable_data_ptr<float>();
  const auto quantize_row = [&](int64_t i) {
    const float* from = w + rows[i] * n;
    if (!held.any()) return grid.fake_quantize(from, n, w_hat + i * n, source.rule);
    return grid.fake_quantize_with(from, n, held(table.shares_scale() ? 0 : rows[i]), w_hat + i * n);
  };
  const auto number = [rows](int64_t i, grid::Status) { return rows[i]; };
  for_each_row(subject, values.size(0), n, [&] { return quantize_row; }, number);
  return look_up(values, touched.position);
}

at::Tensor forward_meta(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                        string_view grid, string_view estimator, string_view scale, string_view tensor,
                        const OptionalTensor& scales, string_view gradient_rule) {
  check_lookup({"quantized_embedding", tensor}, indices, weight, padding_idx, grid, estimator, scale, scales,
               gradient_rule);
  c10::SymDimVector sizes(indices.sym_sizes().begin(), indices.sym_sizes().end());
  sizes.push_back(weight.sym_size(1));
  return at::empty_symint(sizes, weight.options());
}

at::Tensor forward_reference(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                             string_view grid, string_view estimator, string_view scale, string_view tensor,
                             const OptionalTensor& scales, string_view gradient_rule) {
  return forward_operator()
      .call(indices.cpu(), weight.cpu(), padding_idx, grid, estimator, scale, tensor, on_cpu(scales),
            gradient_rule)
      .to(weight.device());
}

/// The gradient of w_hat: that of a row's uses summed, float32[R, N].
at::Tensor summed(const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
                  int64_t padding_idx) {
  return at::embedding_dense_backward(grad_output.to(at::kFloat), indices, weight.size(0), padding_idx,
                                      /*scale_grad_by_freq=*/false);
}

at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
                    int64_t padding_idx, string_view grid, string_view estimator, string_view scale,
                    string_view tensor, const OptionalTensor& scales) {
  const Subject subject{"quantized_embedding_backward", tensor};
  const Table table = check_backward(subject, grad_output, indices, weight, padding_idx, grid, estimator,
                                     scale, scales, to_string(ScaleGradient::kPlain));
  const at::Tensor rows = touched_rows(subject, indices, weight.size(0)).rows.to(weight.device());
  at::Tensor grad = summed(grad_output, indices, weight, padding_idx);
  if (is_identity(table.estimator, table.grid) || rows.numel() == 0) return grad;
  const at::Tensor& held = table.scales.held;
  if (table.shares_scale()) return fake_quantize_backward(grad, weight, grid, table.estimator, tensor, held);
  const at::Tensor passed =
      fake_quantize_backward(grad.index_select(0, rows), weight.index_select(0, rows), grid, table.estimator,
                             tensor, held.defined() ? held.index_select(0, rows) : held);
  return grad.index_copy_(0, rows, passed);
}

/// As `backward`, and the gradient of the scales: rows that no index names get none.
TwoTensors backward_scales(const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
                           const at::Tensor& scales, int64_t padding_idx, string_view grid,
                           string_view estimator, string_view gradient_rule, string_view tensor) {
  const Subject subject{"quantized_embedding_backward_scales", tensor};
  const Table table = check_backward(subject, grad_output, indices, weight, padding_idx, grid, estimator,
                                     "learned", scales, gradient_rule);
  at::Tensor grad = summed(grad_output, indices, weight, padding_idx);
  if (table.shares_scale()) {
    return fake_quantize_backward_scales(grad, weight, scales, grid, table.estimator, tensor);
  }
  const at::Tensor rows = touched_rows(subject, indices, weight.size(0)).rows.to(weight.device());
  at::Tensor grad_scales = at::zeros(scales.sizes(), scales.options());
  if (rows.numel() == 0) return {grad, grad_scales};
  // The factor depends on the whole table, of which the operator below sees these rows only.
  Estimator plain = table.estimator;
  plain.scale_gradient = ScaleGradient::kPlain;
  const auto [by_weight, by_scales] =
      fake_quantize_backward_scales(grad.index_select(0, rows), weight.index_select(0, rows),
                                    scales.index_select(0, rows), grid, plain, tensor);
  const std::vector<float> factors = scale_factors(table.grid, table.estimator.scale_gradient, weight);
  if (!factors.empty()) by_scales.mul_(at::tensor(factors).to(scales.device()));
  return {grad.index_copy_(0, rows, by_weight), grad_scales.index_copy_(0, rows, by_scales)};
}

at::Tensor backward_meta(const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
                         int64_t padding_idx, string_view grid, string_view estimator, string_view scale,
                         string_view tensor, const OptionalTensor& scales) {
  check_backward({"quantized_embedding_backward", tensor}, grad_output, indices, weight, padding_idx, grid,
                 estimator, scale, scales, to_string(ScaleGradient::kPlain));
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

TwoTensors backward_scales_meta(const at::Tensor& grad_output, const at::Tensor& indices,
                                const at::Tensor& weight, const at::Tensor& scales, int64_t padding_idx,
                                string_view grid, string_view estimator, string_view gradient_rule,
                                string_view tensor) {
  check_backward({"quantized_embedding_backward_scales", tensor}, grad_output, indices, weight, padding_idx,
                 grid, estimator, "learned", scales, gradient_rule);
  return {at::empty_symint(weight.sym_sizes(), weight.options()),
          at::empty_symint(scales.sym_sizes(), scales.options())};
}

TORCH_LIBRARY_IMPL(libqat, CPU, m) {
  m.impl("quantized_embedding", forward_cpu);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("quantized_embedding", forward_meta);
  m.impl("quantized_embedding_backward", backward_meta);
  m.impl("quantized_embedding_backward_scales", backward_scales_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("quantized_embedding", forward_reference);
  m.impl("quantized_embedding_backward", backward);
  m.impl("quantized_embedding_backward_scales", backward_scales);
}

}  // namespace
}  // namespace qat::ops
