#include "qat/ops/fake_quantize.hpp"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.hpp"
#include "ops/dispatch.hpp"
#include "ops/rows.hpp"

namespace qat::ops {
namespace {

using std::string_view;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

using Forward = at::Tensor(const at::Tensor&, string_view, string_view, string_view, string_view,
                           const OptionalTensor&, string_view);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, string_view, string_view, string_view,
                            string_view, const OptionalTensor&);
using BackwardScales = TwoTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, string_view,
                                  string_view, string_view, string_view);

c10::TypedOperatorHandle<Forward> forward_operator() {
  static const auto op = find_operator<Forward>("libqat::fake_quantize");
  return op;
}

c10::TypedOperatorHandle<Backward> backward_operator() {
  static const auto op = find_operator<Backward>("libqat::fake_quantize_backward");
  return op;
}

c10::TypedOperatorHandle<BackwardScales> backward_scales_operator() {
  static const auto op = find_operator<BackwardScales>("libqat::fake_quantize_backward_scales");
  return op;
}

/// The checked arguments of an operator.
struct Arguments {
  const grid::Grid& grid;
  EstimatorKind kind;
  Scales scales;
};

Arguments check_forward(const at::Tensor& weight, string_view grid, string_view estimator, string_view scale,
                        string_view tensor, const OptionalTensor& scales, string_view gradient_rule) {
  const Subject subject{"fake_quantize", tensor};
  const EstimatorKind kind = estimator_kind(estimator);
  scale_gradient(gradient_rule);
  const grid::Grid& found = check_weight(subject, weight, grid);
  return {found, kind, check_scales(subject, found, weight, scale, scales)};
}

Arguments check_backward(const Subject& subject, const at::Tensor& grad, const at::Tensor& weight,
                         string_view grid, string_view estimator, string_view scale,
                         const OptionalTensor& scales) {
  const EstimatorKind kind = estimator_kind(estimator);
  const grid::Grid& found = check_weight(subject, weight, grid);
  check_like_weight(subject, "grad", grad, weight);
  return {found, kind, check_scales(subject, found, weight, scale, scales)};
}

Arguments check_backward_scales(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& scales,
                                string_view grid, string_view estimator, string_view gradient_rule,
                                string_view tensor) {
  scale_gradient(gradient_rule);
  return check_backward({"fake_quantize_backward_scales", tensor}, grad, weight, grid, estimator, "learned",
                        scales);
}

at::Tensor forward_cpu(const at::Tensor& weight, string_view grid, string_view estimator, string_view scale,
                       string_view tensor, const OptionalTensor& scales, string_view gradient_rule) {
  const Arguments arguments = check_forward(weight, grid, estimator, scale, tensor, scales, gradient_rule);
  const at::Tensor latent = weight.contiguous();
  at::Tensor w_hat = at::empty(latent.sizes(), latent.options());
  quantize_rows({"fake_quantize", tensor}, arguments.grid, arguments.scales, latent, w_hat);
  return w_hat;
}

at::Tensor forward_meta(const at::Tensor& weight, string_view grid, string_view estimator, string_view scale,
                        string_view tensor, const OptionalTensor& scales, string_view gradient_rule) {
  check_forward(weight, grid, estimator, scale, tensor, scales, gradient_rule);
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

at::Tensor forward_reference(const at::Tensor& weight, string_view grid, string_view estimator,
                             string_view scale, string_view tensor, const OptionalTensor& scales,
                             string_view gradient_rule) {
  return forward_operator()
      .call(weight.cpu(), grid, estimator, scale, tensor, on_cpu(scales), gradient_rule)
      .to(weight.device());
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                        string_view estimator, string_view scale, string_view tensor,
                        const OptionalTensor& scales) {
  const Subject subject{"fake_quantize_backward", tensor};
  const Arguments arguments = check_backward(subject, grad, weight, grid, estimator, scale, scales);
  if (is_identity({arguments.kind, arguments.scales.rule}, arguments.grid)) {
    return grad.clone(at::MemoryFormat::Contiguous);
  }
  const at::Tensor latent = weight.contiguous();
  at::Tensor grad_weight = at::empty(latent.sizes(), latent.options());
  backward_rows(subject, arguments.grid, arguments.scales, arguments.kind, grad.contiguous(), latent,
                grad_weight);
  return grad_weight;
}

at::Tensor backward_meta(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                         string_view estimator, string_view scale, string_view tensor,
                         const OptionalTensor& scales) {
  check_backward({"fake_quantize_backward", tensor}, grad, weight, grid, estimator, scale, scales);
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

at::Tensor backward_reference(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                              string_view estimator, string_view scale, string_view tensor,
                              const OptionalTensor& scales) {
  return backward_operator()
      .call(grad.cpu(), weight.cpu(), grid, estimator, scale, tensor, on_cpu(scales))
      .to(weight.device());
}

TwoTensors backward_scales_cpu(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& scales,
                               string_view grid, string_view estimator, string_view gradient_rule,
                               string_view tensor) {
  const Arguments arguments =
      check_backward_scales(grad, weight, scales, grid, estimator, gradient_rule, tensor);
  const at::Tensor latent = weight.contiguous();
  at::Tensor grad_weight = at::empty(latent.sizes(), latent.options());
  at::Tensor grad_scales = at::empty(scales.sizes(), scales.options());
  backward_rows({"fake_quantize_backward_scales", tensor}, arguments.grid, arguments.scales, arguments.kind,
                grad.contiguous(), latent, grad_weight, grad_scales,
                scale_factors(arguments.grid, scale_gradient(gradient_rule), latent));
  return {grad_weight, grad_scales};
}

TwoTensors backward_scales_meta(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& scales,
                                string_view grid, string_view estimator, string_view gradient_rule,
                                string_view tensor) {
  check_backward_scales(grad, weight, scales, grid, estimator, gradient_rule, tensor);
  return {at::empty_symint(weight.sym_sizes(), weight.options()),
          at::empty_symint(scales.sym_sizes(), scales.options())};
}

TwoTensors backward_scales_reference(const at::Tensor& grad, const at::Tensor& weight,
                                     const at::Tensor& scales, string_view grid, string_view estimator,
                                     string_view gradient_rule, string_view tensor) {
  const auto [grad_weight, grad_scales] = backward_scales_operator().call(
      grad.cpu(), weight.cpu(), scales.cpu(), grid, estimator, gradient_rule, tensor);
  return {grad_weight.to(weight.device()), grad_scales.to(weight.device())};
}

class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, string_view grid,
                            string_view estimator, string_view scale, string_view tensor,
                            const OptionalTensor& scales, string_view gradient_rule) {
    auto& data = context->saved_data;
    data["grid"] = std::string(grid);
    data["estimator"] = std::string(estimator);
    data["scale"] = std::string(scale);
    data["tensor"] = std::string(tensor);
    data["scale_gradient"] = std::string(gradient_rule);
    context->save_for_backward({weight, scales.value_or(at::Tensor())});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(weight, grid, estimator, scale, tensor, scales, gradient_rule);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    const auto saved = context->get_saved_variables();
    const at::Tensor& scales = saved[1];
    const string_view grid = data["grid"].toStringView(), tensor = data["tensor"].toStringView();
    const string_view estimator = data["estimator"].toStringView(), scale = data["scale"].toStringView();
    variable_list result(7);
    if (scales.defined() && context->needs_input_grad(1)) {
      std::tie(result[0], result[5]) = backward_scales_operator().call(
          grads[0], saved[0], scales, grid, estimator, data["scale_gradient"].toStringView(), tensor);
    } else if (!at::GradMode::is_enabled() && is_identity(estimator, scale)) {
      result[0] = grads[0];  // needs no copy, except to hang the refusal of a second derivative on it
    } else {
      result[0] = backward_operator().call(grads[0], saved[0], grid, estimator, scale, tensor,
                                           optional_tensor(scales));
    }
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& weight, string_view grid, string_view estimator,
                            string_view scale, string_view tensor, const OptionalTensor& scales,
                            string_view gradient_rule) {
  return FakeQuantize::apply(weight, grid, estimator, scale, tensor, scales, gradient_rule);
}

TORCH_LIBRARY_IMPL(libqat, CPU, m) {
  m.impl("fake_quantize", forward_cpu);
  m.impl("fake_quantize_backward", backward_cpu);
  m.impl("fake_quantize_backward_scales", backward_scales_cpu);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("fake_quantize", forward_meta);
  m.impl("fake_quantize_backward", backward_meta);
  m.impl("fake_quantize_backward_scales", backward_scales_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("fake_quantize", forward_reference);
  m.impl("fake_quantize_backward", backward_reference);
  m.impl("fake_quantize_backward_scales", backward_scales_reference);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("fake_quantize", forward_autograd);
  m.impl("fake_quantize_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("fake_quantize_backward_scales", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

at::Tensor fake_quantize(const at::Tensor& weight, string_view grid, const Estimator& estimator,
                         string_view tensor, const at::Tensor& scales) {
  return forward_operator().call(weight, grid, to_string(estimator.kind), to_string(estimator.scale), tensor,
                                 optional_tensor(scales), to_string(estimator.scale_gradient));
}

at::Tensor quantized_weight(const at::Tensor& weight, at::ScalarType dtype, string_view grid, ScaleRule scale,
                            string_view tensor, const at::Tensor& scales) {
  const at::Tensor held = scales.defined() ? scales.detach() : scales;
  if (!weight.is_cpu() || dtype != at::kBFloat16) {
    return fake_quantize(weight.detach(), grid, {EstimatorKind::kSte, scale}, tensor, held).to(dtype);
  }
  // The row kernels round to bfloat16 themselves: no float32 copy of a large table.
  const Subject subject{"quantized_weight", tensor};
  const grid::Grid& found = check_weight(subject, weight, grid);
  at::Tensor w_hat = at::empty(weight.sizes(), at::TensorOptions(dtype));
  quantize_rows(subject, found, check_scales(subject, found, weight, to_string(scale), optional_tensor(held)),
                weight.contiguous(), w_hat);
  return w_hat;
}

at::Tensor fake_quantize_backward(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                                  const Estimator& estimator, string_view tensor, const at::Tensor& scales) {
  return backward_operator().call(grad, weight, grid, to_string(estimator.kind), to_string(estimator.scale),
                                  tensor, optional_tensor(scales));
}

TwoTensors fake_quantize_backward_scales(const at::Tensor& grad, const at::Tensor& weight,
                                         const at::Tensor& scales, string_view grid,
                                         const Estimator& estimator, string_view tensor) {
  return backward_scales_operator().call(grad, weight, scales, grid, to_string(estimator.kind),
                                         to_string(estimator.scale_gradient), tensor);
}

}  // namespace qat::ops
