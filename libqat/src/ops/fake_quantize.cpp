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

using Forward = at::Tensor(const at::Tensor&, string_view, string_view, string_view, string_view);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, string_view, string_view, string_view,
                            string_view);

c10::TypedOperatorHandle<Forward> forward_operator() {
  static const auto op = find_operator<Forward>("libqat::fake_quantize");
  return op;
}

c10::TypedOperatorHandle<Backward> backward_operator() {
  static const auto op = find_operator<Backward>("libqat::fake_quantize_backward");
  return op;
}

const grid::Grid& check_forward(const at::Tensor& weight, string_view grid, string_view estimator,
                                string_view scale, string_view tensor) {
  estimator_kind(estimator);
  scale_rule(scale);
  return check_weight({"fake_quantize", tensor}, weight, grid);
}

const grid::Grid& check_backward(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                                 string_view tensor) {
  const Subject subject{"fake_quantize_backward", tensor};
  const grid::Grid& found = check_weight(subject, weight, grid);
  check_like_weight(subject, "grad", grad, weight);
  return found;
}

at::Tensor forward_cpu(const at::Tensor& weight, string_view grid, string_view estimator, string_view scale,
                       string_view tensor) {
  const grid::Grid& found = check_forward(weight, grid, estimator, scale, tensor);
  const at::Tensor latent = weight.contiguous();
  at::Tensor w_hat = at::empty(latent.sizes(), latent.options());
  quantize_rows({"fake_quantize", tensor}, found, scale_rule(scale), latent, w_hat);
  return w_hat;
}

at::Tensor forward_meta(const at::Tensor& weight, string_view grid, string_view estimator, string_view scale,
                        string_view tensor) {
  check_forward(weight, grid, estimator, scale, tensor);
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

at::Tensor forward_reference(const at::Tensor& weight, string_view grid, string_view estimator,
                             string_view scale, string_view tensor) {
  return forward_operator().call(weight.cpu(), grid, estimator, scale, tensor).to(weight.device());
}

/// out[r, i] = grad[r, i] where the scales that `rule` gives row r of latent can represent latent[r, i], else
/// 0.
void mask_rows(const Subject& subject, const grid::Grid& grid, ScaleRule rule, const at::Tensor& grad,
               const at::Tensor& latent, const at::Tensor& out) {
  const GridRows rows(grid, latent);
  const int64_t n = rows.width();
  const float* g = grad.const_data_ptr<float>();
  const float* w = latent.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const auto make = [&] {
    return [&, scales = std::vector<float>(grid.blocks(n) * grid.params()),
            inside = std::vector<uint8_t>(n)](int64_t row) mutable {
      const grid::Status status = grid.scales(rule, w + row * n, n, scales.data());
      if (status != grid::Status::kOk) return status;
      grid.in_range(w + row * n, n, scales.data(), inside.data());
      for (int64_t i = 0; i < n; ++i) to[row * n + i] = inside[i] != 0 ? g[row * n + i] : 0.0F;
      return status;
    };
  };
  for_each_row(subject, rows.count(), n, make, rows);
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                        string_view estimator, string_view scale, string_view tensor) {
  const grid::Grid& found = check_backward(grad, weight, grid, tensor);
  const ScaleRule rule = scale_rule(scale);
  if (estimator_kind(estimator) == EstimatorKind::kSte || found.info().is_float) {
    return grad.clone(at::MemoryFormat::Contiguous);
  }
  const at::Tensor latent = weight.contiguous();
  at::Tensor out = at::empty(latent.sizes(), latent.options());
  mask_rows({"fake_quantize_backward", tensor}, found, rule, grad.contiguous(), latent, out);
  return out;
}

at::Tensor backward_meta(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                         string_view estimator, string_view scale, string_view tensor) {
  estimator_kind(estimator);
  scale_rule(scale);
  check_backward(grad, weight, grid, tensor);
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

at::Tensor backward_reference(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                              string_view estimator, string_view scale, string_view tensor) {
  return backward_operator()
      .call(grad.cpu(), weight.cpu(), grid, estimator, scale, tensor)
      .to(weight.device());
}

class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, string_view grid,
                            string_view estimator, string_view scale, string_view tensor) {
    context->saved_data["grid"] = std::string(grid);
    context->saved_data["estimator"] = std::string(estimator);
    context->saved_data["scale"] = std::string(scale);
    context->saved_data["tensor"] = std::string(tensor);
    context->save_for_backward({weight});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(weight, grid, estimator, scale, tensor);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    const bool identity = data["estimator"].toStringView() == to_string(EstimatorKind::kSte);
    // The identity needs no copy, except to hang the refusal of a second derivative on it.
    if (identity && !at::GradMode::is_enabled()) return {grads[0], {}, {}, {}, {}};
    return {backward_operator().call(grads[0], context->get_saved_variables()[0], data["grid"].toStringView(),
                                     data["estimator"].toStringView(), data["scale"].toStringView(),
                                     data["tensor"].toStringView()),
            {},
            {},
            {},
            {}};
  }
};

at::Tensor forward_autograd(const at::Tensor& weight, string_view grid, string_view estimator,
                            string_view scale, string_view tensor) {
  return FakeQuantize::apply(weight, grid, estimator, scale, tensor);
}

TORCH_LIBRARY_IMPL(libqat, CPU, m) {
  m.impl("fake_quantize", forward_cpu);
  m.impl("fake_quantize_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("fake_quantize", forward_meta);
  m.impl("fake_quantize_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("fake_quantize", forward_reference);
  m.impl("fake_quantize_backward", backward_reference);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("fake_quantize", forward_autograd);
  m.impl("fake_quantize_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

at::Tensor fake_quantize(const at::Tensor& weight, string_view grid, const Estimator& estimator,
                         string_view tensor) {
  return forward_operator().call(weight, grid, to_string(estimator.kind), to_string(estimator.scale), tensor);
}

at::Tensor quantized_weight(const at::Tensor& weight, at::ScalarType dtype, string_view grid, ScaleRule scale,
                            string_view tensor) {
  if (!weight.is_cpu() || dtype != at::kBFloat16) {
    return fake_quantize(weight.detach(), grid, {EstimatorKind::kSte, scale}, tensor).to(dtype);
  }
  // The row kernels round to bfloat16 themselves: no float32 copy of a large table.
  const Subject subject{"quantized_weight", tensor};
  const grid::Grid& found = check_weight(subject, weight, grid);
  at::Tensor w_hat = at::empty(weight.sizes(), at::TensorOptions(dtype));
  quantize_rows(subject, found, scale, weight.contiguous(), w_hat);
  return w_hat;
}

at::Tensor fake_quantize_backward(const at::Tensor& grad, const at::Tensor& weight, string_view grid,
                                  const Estimator& estimator, string_view tensor) {
  return backward_operator().call(grad, weight, grid, to_string(estimator.kind), to_string(estimator.scale),
                                  tensor);
}

}  // namespace qat::ops
