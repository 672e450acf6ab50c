// The gradients of quantized_linear, and the functions that C++ calls.

#include <ATen/autocast_mode.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>

#include "ops/check.hpp"
#include "ops/linear_operators.hpp"
#include "qat/ops/quantized_linear.hpp"

namespace qat::ops {
namespace {

using namespace linear;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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
                            string_view scale, string_view tensor, const OptionalTensor& scales,
                            string_view gradient_rule) {
    auto& data = context->saved_data;
    data["grid"] = std::string(grid);
    data["estimator"] = std::string(estimator);
    data["scale"] = std::string(scale);
    data["tensor"] = std::string(tensor);
    data["scale_gradient"] = std::string(gradient_rule);
    if (bias) data["bias"] = static_cast<int64_t>(bias->scalar_type());
    // The compute dtype travels with the saved input (autocast has already cast it) and with grad_output.
    context->save_for_backward({input, weight, scales.value_or(at::Tensor())});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(input, weight, bias, grid, estimator, scale, tensor, scales,
                                   gradient_rule);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    const auto saved = context->get_saved_variables();
    const at::Tensor &input = saved[0], &weight = saved[1], &scales = saved[2];
    const string_view grid = data["grid"].toStringView(), tensor = data["tensor"].toStringView();
    const string_view estimator = data["estimator"].toStringView(), scale = data["scale"].toStringView();
    const auto bias = data.find("bias");
    const size_t scales_place = bias == data.end() ? 2 : 3;  // among the tensors that forward was given
    variable_list result(9);
    if (context->needs_input_grad(0)) {
      result[0] = grad_input_operator().call(grads[0], weight, grid, scale, tensor, optional_tensor(scales));
    }
    if (scales.defined() && context->needs_input_grad(scales_place)) {
      std::tie(result[1], result[7]) = grad_scales_operator().call(
          grads[0], input, weight, scales, grid, estimator, data["scale_gradient"].toStringView(), tensor);
    } else if (context->needs_input_grad(1)) {
      result[1] = grad_weight_operator().call(grads[0], input, weight, grid, estimator, scale, tensor,
                                              optional_tensor(scales));
    }
    if (bias != data.end() && context->needs_input_grad(2)) {
      result[2] = grad_bias(grads[0], static_cast<at::ScalarType>(bias->second.toInt()));
    }
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            string_view grid, string_view estimator, string_view scale, string_view tensor,
                            const OptionalTensor& scales, string_view gradient_rule) {
  return QuantizedLinear::apply(input, weight, bias, grid, estimator, scale, tensor, scales, gradient_rule);
}

template <at::DeviceType device>
at::Tensor forward_autocast(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            string_view grid, string_view estimator, string_view scale, string_view tensor,
                            const OptionalTensor& scales, string_view gradient_rule) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return forward_operator().call(at::autocast::cached_cast(dtype, input, device), weight, bias, grid,
                                 estimator, scale, tensor, scales, gradient_rule);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("quantized_linear", forward_autograd);
  m.impl("quantized_linear_grad_input", torch::autograd::autogradNotImplementedFallback());
  m.impl("quantized_linear_grad_weight", torch::autograd::autogradNotImplementedFallback());
  m.impl("quantized_linear_grad_scales", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(libqat, AutocastCPU, m) {
  m.impl("quantized_linear", forward_autocast<at::kCPU>);
}

TORCH_LIBRARY_IMPL(libqat, AutocastCUDA, m) {
  m.impl("quantized_linear", forward_autocast<at::kCUDA>);
}

}  // namespace

at::Tensor quantized_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            string_view grid, const Estimator& estimator, string_view tensor,
                            const at::Tensor& scales) {
  return forward_operator().call(input, weight, bias, grid, to_string(estimator.kind),
                                 to_string(estimator.scale), tensor, optional_tensor(scales),
                                 to_string(estimator.scale_gradient));
}

at::Tensor quantized_linear_grad_input(const at::Tensor& grad_output, const at::Tensor& weight,
                                       string_view grid, ScaleRule scale, string_view tensor,
                                       const at::Tensor& scales) {
  return grad_input_operator().call(grad_output, weight, grid, to_string(scale), tensor,
                                    optional_tensor(scales));
}

at::Tensor quantized_linear_grad_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                        const at::Tensor& weight, string_view grid,
                                        const Estimator& estimator, string_view tensor,
                                        const at::Tensor& scales) {
  return grad_weight_operator().call(grad_output, input, weight, grid, to_string(estimator.kind),
                                     to_string(estimator.scale), tensor, optional_tensor(scales));
}

TwoTensors quantized_linear_grad_scales(const at::Tensor& grad_output, const at::Tensor& input,
                                        const at::Tensor& weight, const at::Tensor& scales, string_view grid,
                                        const Estimator& estimator, string_view tensor) {
  return grad_scales_operator().call(grad_output, input, weight, scales, grid, to_string(estimator.kind),
                                     to_string(estimator.scale_gradient), tensor);
}

}  // namespace qat::ops
