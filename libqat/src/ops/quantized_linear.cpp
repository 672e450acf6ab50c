#include "qat/ops/quantized_linear.hpp"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>

#include "ops/check.hpp"
#include "ops/dispatch.hpp"
#include "ops/rows.hpp"
#include "ops/scratch.hpp"
#include "qat/ops/fake_quantize.hpp"

namespace qat::ops {
namespace {

using std::string_view;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, string_view,
                           string_view, string_view, string_view);
using GradInput = at::Tensor(const at::Tensor&, const at::Tensor&, string_view, string_view, string_view);
using GradWeight = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, string_view,
                              string_view, string_view, string_view);

c10::TypedOperatorHandle<Forward> forward_operator() {
  static const auto op = find_operator<Forward>("libqat::quantized_linear");
  return op;
}

c10::TypedOperatorHandle<GradInput> grad_input_operator() {
  static const auto op = find_operator<GradInput>("libqat::quantized_linear_grad_input");
  return op;
}

c10::TypedOperatorHandle<GradWeight> grad_weight_operator() {
  static const auto op = find_operator<GradWeight>("libqat::quantized_linear_grad_weight");
  return op;
}

const grid::Grid& check_forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                string_view grid, string_view estimator, string_view scale,
                                string_view tensor) {
  const Subject subject{"quantized_linear", tensor};
  estimator_kind(estimator);
  scale_rule(scale);
  const grid::Grid& found = check_matrix(subject, weight, grid);
  check_activation(subject, "input", input, weight.sym_size(1), weight);
  if (bias) {
    if (bias->dim() != 1) fail(subject, "bias of 1 dimension", describe(*bias));
    check_activation(subject, "bias", *bias, weight.sym_size(0), weight);
  }
  return found;
}

const grid::Grid& check_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, string_view grid,
                                   string_view scale, string_view tensor) {
  const Subject subject{"quantized_linear_grad_input", tensor};
  scale_rule(scale);
  const grid::Grid& found = check_matrix(subject, weight, grid);
  check_activation(subject, "grad_output", grad_output, weight.sym_size(0), weight);
  return found;
}

void check_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                       string_view grid, string_view estimator, string_view scale, string_view tensor) {
  const Subject subject{"quantized_linear_grad_weight", tensor};
  estimator_kind(estimator);
  scale_rule(scale);
  check_matrix(subject, weight, grid);
  check_activation(subject, "grad_output", grad_output, weight.sym_size(0), weight);
  check_activation(subject, "input", input, weight.sym_size(1), weight);
  if (grad_output.scalar_type() != input.scalar_type()) {
    fail(subject, "grad_output of input's dtype " + describe(input), describe(grad_output));
  }
}

/// w_hat[O, I] rounded to `dtype`, on the device of `weight`.
using WeightSource = at::Tensor (*)(const at::Tensor& weight, const grid::Grid& grid, ScaleRule rule,
                                    at::ScalarType dtype, const Subject& subject);

at::Tensor scratch_weight(const at::Tensor& weight, const grid::Grid& grid, ScaleRule rule,
                          at::ScalarType dtype, const Subject& subject) {
  const at::ScalarType row_dtype = dtype == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  const at::Tensor w_hat = scratch(weight.sizes(), row_dtype);
  quantize_rows(subject, grid, rule, weight.contiguous(), w_hat);
  return w_hat.to(dtype);  // w_hat itself, except for float16
}

at::Tensor reference_weight(const at::Tensor& weight, const grid::Grid& grid, ScaleRule rule,
                            at::ScalarType dtype, const Subject& subject) {
  return fake_quantize(weight, grid.info().name, {EstimatorKind::kSte, rule}, subject.tensor).to(dtype);
}

/// [..., n] -> [T, n].
at::Tensor flatten_tokens(const at::Tensor& value) {
  const int64_t n = value.size(-1);
  return value.reshape({value.numel() / n, n});
}

// Matrix products inside a kernel must not be cast once more: backward may run under another autocast state
// than forward did.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

template <WeightSource source>
at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                   string_view grid, string_view estimator, string_view scale, string_view tensor) {
  const grid::Grid& found = check_forward(input, weight, bias, grid, estimator, scale, tensor);
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = input.scalar_type();
  const at::Tensor w_hat = source(weight, found, scale_rule(scale), dtype, {"quantized_linear", tensor});
  return at::linear(input, w_hat, bias ? OptionalTensor(bias->to(dtype)) : std::nullopt);
}

template <WeightSource source>
at::Tensor grad_input(const at::Tensor& grad_output, const at::Tensor& weight, string_view grid,
                      string_view scale, string_view tensor) {
  const grid::Grid& found = check_grad_input(grad_output, weight, grid, scale, tensor);
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const at::Tensor w_hat = source(weight, found, scale_rule(scale), grad_output.scalar_type(),
                                  {"quantized_linear_grad_input", tensor});
  std::vector<int64_t> sizes = grad_output.sizes().vec();
  sizes.back() = weight.size(1);
  return at::mm(flatten_tokens(grad_output), w_hat).view(sizes);
}

at::Tensor grad_weight(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                       string_view grid, string_view estimator, string_view scale, string_view tensor) {
  check_grad_weight(grad_output, input, weight, grid, estimator, scale, tensor);
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const at::Tensor grad = at::mm(flatten_tokens(grad_output).t(), flatten_tokens(input)).to(at::kFloat);
  const EstimatorKind kind = estimator_kind(estimator);
  return kind == EstimatorKind::kSte
             ? grad
             : fake_quantize_backward(grad, weight, grid, {kind, scale_rule(scale)}, tensor);
}

at::Tensor with_last_size(const at::Tensor& value, const c10::SymInt& last) {
  c10::SymDimVector sizes(value.sym_sizes().begin(), value.sym_sizes().end());
  sizes.back() = last;
  return at::empty_symint(sizes, value.options());
}

at::Tensor forward_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                        string_view grid, string_view estimator, string_view scale, string_view tensor) {
  check_forward(input, weight, bias, grid, estimator, scale, tensor);
  return with_last_size(input, weight.sym_size(0));
}

at::Tensor grad_input_meta(const at::Tensor& grad_output, const at::Tensor& weight, string_view grid,
                           string_view scale, string_view tensor) {
  check_grad_input(grad_output, weight, grid, scale, tensor);
  return with_last_size(grad_output, weight.sym_size(1));
}

at::Tensor grad_weight_meta(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                            string_view grid, string_view estimator, string_view scale, string_view tensor) {
  check_grad_weight(grad_output, input, weight, grid, estimator, scale, tensor);
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

/// The sum over tokens, accumulated and returned in the bias's dtype.
at::Tensor grad_bias(const at::Tensor& grad_output, at::ScalarType dtype) {
  std::vector<int64_t> tokens(grad_output.dim() - 1);
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens.empty() ? grad_output.to(dtype) : at::sum(grad_output, tokens, false, dtype);
}

class QuantizedLinear : public torch::autograd::Function<QuantizedLinear> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight,
                            const OptionalTensor& bias, string_view grid, string_view estimator,
                            string_view scale, string_view tensor) {
    auto& data = context->saved_data;
    data["grid"] = std::string(grid);
    data["estimator"] = std::string(estimator);
    data["scale"] = std::string(scale);
    data["tensor"] = std::string(tensor);
    if (bias) data["bias"] = static_cast<int64_t>(bias->scalar_type());
    // The compute dtype travels with the saved input (autocast has already cast it) and with grad_output.
    context->save_for_backward({input, weight});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(input, weight, bias, grid, estimator, scale, tensor);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    const auto saved = context->get_saved_variables();
    const string_view grid = data["grid"].toStringView();
    const string_view scale = data["scale"].toStringView();
    const string_view tensor = data["tensor"].toStringView();
    variable_list result(7);
    if (context->needs_input_grad(0))
      result[0] = grad_input_operator().call(grads[0], saved[1], grid, scale, tensor);
    if (context->needs_input_grad(1)) {
      result[1] = grad_weight_operator().call(grads[0], saved[0], saved[1], grid,
                                              data["estimator"].toStringView(), scale, tensor);
    }
    if (const auto bias = data.find("bias"); bias != data.end() && context->needs_input_grad(2)) {
      result[2] = grad_bias(grads[0], static_cast<at::ScalarType>(bias->second.toInt()));
    }
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            string_view grid, string_view estimator, string_view scale, string_view tensor) {
  return QuantizedLinear::apply(input, weight, bias, grid, estimator, scale, tensor);
}

template <at::DeviceType device>
at::Tensor forward_autocast(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            string_view grid, string_view estimator, string_view scale, string_view tensor) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return forward_operator().call(at::autocast::cached_cast(dtype, input, device), weight, bias, grid,
                                 estimator, scale, tensor);
}

TORCH_LIBRARY_IMPL(libqat, CPU, m) {
  m.impl("quantized_linear", forward<scratch_weight>);
  m.impl("quantized_linear_grad_input", grad_input<scratch_weight>);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("quantized_linear", forward_meta);
  m.impl("quantized_linear_grad_input", grad_input_meta);
  m.impl("quantized_linear_grad_weight", grad_weight_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("quantized_linear", forward<reference_weight>);
  m.impl("quantized_linear_grad_input", grad_input<reference_weight>);
  m.impl("quantized_linear_grad_weight", grad_weight);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("quantized_linear", forward_autograd);
  m.impl("quantized_linear_grad_input", torch::autograd::autogradNotImplementedFallback());
  m.impl("quantized_linear_grad_weight", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(libqat, AutocastCPU, m) {
  m.impl("quantized_linear", forward_autocast<at::kCPU>);
}

TORCH_LIBRARY_IMPL(libqat, AutocastCUDA, m) {
  m.impl("quantized_linear", forward_autocast<at::kCUDA>);
}

}  // namespace

at::Tensor quantized_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            string_view grid, const Estimator& estimator, string_view tensor) {
  return forward_operator().call(input, weight, bias, grid, to_string(estimator.kind),
                                 to_string(estimator.scale), tensor);
}

at::Tensor quantized_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight,
                                       string_view grid, ScaleRule scale, string_view tensor) {
  return grad_input_operator().call(grad_output, weight, grid, to_string(scale), tensor);
}

at::Tensor quantized_linear_grad_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                        const at::Tensor& weight, string_view grid,
                                        const Estimator& estimator, string_view tensor) {
  return grad_weight_operator().call(grad_output, input, weight, grid, to_string(estimator.kind),
                                     to_string(estimator.scale), tensor);
}

}  // namespace qat::ops
