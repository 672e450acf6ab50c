#include "qat/ops/quantized_linear.hpp"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "ops/check.hpp"
#include "ops/linear_operators.hpp"
#include "ops/rows.hpp"
#include "ops/scratch.hpp"
#include "qat/ops/fake_quantize.hpp"

namespace qat::ops {
namespace {

using namespace linear;

/// A latent on its way through the grid; arguments have been checked.
struct Source {
  const at::Tensor& weight;
  const grid::Grid& grid;
  Scales scales;
};

Source check_forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                     string_view grid, string_view estimator, string_view scale, string_view tensor,
                     const OptionalTensor& scales, string_view gradient_rule) {
  const Subject subject{"quantized_linear", tensor};
  estimator_kind(estimator);
  scale_gradient(gradient_rule);
  const grid::Grid& found = check_matrix(subject, weight, grid);
  check_activation(subject, "input", input, weight.sym_size(1), weight);
  if (bias) {
    if (bias->dim() != 1) fail(subject, "bias of 1 dimension", describe(*bias));
    check_activation(subject, "bias", *bias, weight.sym_size(0), weight);
  }
  return {weight, found, check_scales(subject, found, weight, scale, scales)};
}

Source check_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, string_view grid,
                        string_view scale, string_view tensor, const OptionalTensor& scales) {
  const Subject subject{"quantized_linear_grad_input", tensor};
  const grid::Grid& found = check_matrix(subject, weight, grid);
  check_activation(subject, "grad_output", grad_output, weight.sym_size(0), weight);
  return {weight, found, check_scales(subject, found, weight, scale, scales)};
}

Source check_grad_weight(const Subject& subject, const at::Tensor& grad_output, const at::Tensor& input,
                         const at::Tensor& weight, string_view grid, string_view estimator, string_view scale,
                         const OptionalTensor& scales) {
  estimator_kind(estimator);
  const grid::Grid& found = check_matrix(subject, weight, grid);
  check_activation(subject, "grad_output", grad_output, weight.sym_size(0), weight);
  check_activation(subject, "input", input, weight.sym_size(1), weight);
  if (grad_output.scalar_type() != input.scalar_type()) {
    fail(subject, "grad_output of input's dtype " + describe(input), describe(grad_output));
  }
  return {weight, found, check_scales(subject, found, weight, scale, scales)};
}

/// w_hat[O, I] rounded to `dtype`, on the device of the latent.
using MakeWeight = at::Tensor (*)(const Source& source, at::ScalarType dtype, const Subject& subject);

at::Tensor scratch_weight(const Source& source, at::ScalarType dtype, const Subject& subject) {
  const at::ScalarType row_dtype = dtype == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  const at::Tensor w_hat = scratch(source.weight.sizes(), row_dtype);
  quantize_rows(subject, source.grid, source.scales, source.weight.contiguous(), w_hat);
  return w_hat.to(dtype);  // w_hat itself, except for float16
}

at::Tensor reference_weight(const Source& source, at::ScalarType dtype, const Subject& subject) {
  const Estimator estimator{EstimatorKind::kSte, source.scales.rule};
  return fake_quantize(source.weight, source.grid.info().name, estimator, subject.tensor, source.scales.held)
      .to(dtype);
}

/// [..., n] -> [T, n].
at::Tensor flatten_tokens(const at::Tensor& value) {
  const int64_t n = value.size(-1);
  return value.reshape({value.numel() / n, n});
}

template <MakeWeight make>
at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                   string_view grid, string_view estimator, string_view scale, string_view tensor,
                   const OptionalTensor& scales, string_view gradient_rule) {
  const Source source =
      check_forward(input, weight, bias, grid, estimator, scale, tensor, scales, gradient_rule);
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = input.scalar_type();
  const at::Tensor w_hat = make(source, dtype, {"quantized_linear", tensor});
  return at::linear(input, w_hat, bias ? OptionalTensor(bias->to(dtype)) : std::nullopt);
}

template <MakeWeight make>
at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& weight, string_view grid,
                      string_view scale, string_view tensor, const OptionalTensor& scales) {
  const Source source = check_grad_input(grad_output, weight, grid, scale, tensor, scales);
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const at::Tensor w_hat = make(source, grad_output.scalar_type(), {"quantized_linear_grad_input", tensor});
  std::vector<int64_t> sizes = grad_output.sizes().vec();
  sizes.back() = weight.size(1);
  return at::mm(flatten_tokens(grad_output), w_hat).view(sizes);
}

/// dL/dw_hat in float32.
at::Tensor product(const at::Tensor& grad_output, const at::Tensor& input) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  return at::mm(flatten_tokens(grad_output).t(), flatten_tokens(input)).to(at::kFloat);
}

at::Tensor grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                       string_view grid, string_view estimator, string_view scale, string_view tensor,
                       const OptionalTensor& scales) {
  const Subject subject{"quantized_linear_grad_weight", tensor};
  const Source source =
      check_grad_weight(subject, grad_output, input, weight, grid, estimator, scale, scales);
  const Estimator rules{estimator_kind(estimator), source.scales.rule};
  const at::Tensor grad = product(grad_output, input);
  if (is_identity(rules, source.grid)) return grad;
  if (!grad.is_cpu()) return fake_quantize_backward(grad, weight, grid, rules, tensor, source.scales.held);
  // In place: a second matrix of gradients would double the peak of a large layer.
  backward_rows(subject, source.grid, source.scales, rules.kind, grad, weight.contiguous(), grad);
  return grad;
}

TwoTensors grad_scales(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                       const at::Tensor& scales, string_view grid, string_view estimator,
                       string_view gradient_rule, string_view tensor) {
  const Subject subject{"quantized_linear_grad_scales", tensor};
  const Source source =
      check_grad_weight(subject, grad_output, input, weight, grid, estimator, "learned", scales);
  const Estimator rules{estimator_kind(estimator), ScaleRule::kLearned, scale_gradient(gradient_rule)};
  const at::Tensor grad = product(grad_output, input);
  if (!grad.is_cpu()) return fake_quantize_backward_scales(grad, weight, scales, grid, rules, tensor);
  at::Tensor by_scales = at::empty(scales.sizes(), scales.options());
  backward_rows(subject, source.grid, source.scales, rules.kind, grad, weight.contiguous(), grad, by_scales,
                scale_factors(source.grid, rules.scale_gradient, weight));
  return {grad, by_scales};
}

at::Tensor with_last_size(const at::Tensor& value, const c10::SymInt& last) {
  c10::SymDimVector sizes(value.sym_sizes().begin(), value.sym_sizes().end());
  sizes.back() = last;
  return at::empty_symint(sizes, value.options());
}

at::Tensor forward_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                        string_view grid, string_view estimator, string_view scale, string_view tensor,
                        const OptionalTensor& scales, string_view gradient_rule) {
  check_forward(input, weight, bias, grid, estimator, scale, tensor, scales, gradient_rule);
  return with_last_size(input, weight.sym_size(0));
}

at::Tensor grad_input_meta(const at::Tensor& grad_output, const at::Tensor& weight, string_view grid,
                           string_view scale, string_view tensor, const OptionalTensor& scales) {
  check_grad_input(grad_output, weight, grid, scale, tensor, scales);
  return with_last_size(grad_output, weight.sym_size(1));
}

at::Tensor grad_weight_meta(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                            string_view grid, string_view estimator, string_view scale, string_view tensor,
                            const OptionalTensor& scales) {
  check_grad_weight({"quantized_linear_grad_weight", tensor}, grad_output, input, weight, grid, estimator,
                    scale, scales);
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

TwoTensors grad_scales_meta(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& scales, string_view grid, string_view estimator,
                            string_view gradient_rule, string_view tensor) {
  scale_gradient(gradient_rule);
  check_grad_weight({"quantized_linear_grad_scales", tensor}, grad_output, input, weight, grid, estimator,
                    "learned", scales);
  return {at::empty_symint(weight.sym_sizes(), weight.options()),
          at::empty_symint(scales.sym_sizes(), scales.options())};
}

TORCH_LIBRARY_IMPL(libqat, CPU, m) {
  m.impl("quantized_linear", forward<scratch_weight>);
  m.impl("quantized_linear_grad_input", grad_input<scratch_weight>);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("quantized_linear", forward_meta);
  m.impl("quantized_linear_grad_input", grad_input_meta);
  m.impl("quantized_linear_grad_weight", grad_weight_meta);
  m.impl("quantized_linear_grad_scales", grad_scales_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("quantized_linear", forward<reference_weight>);
  m.impl("quantized_linear_grad_input", grad_input<reference_weight>);
  m.impl("quantized_linear_grad_weight", grad_weight);
  m.impl("quantized_linear_grad_scales", grad_scales);
}

}  // namespace
}  // namespace qat::ops
