#include "qat/ops/activation.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>

#include "ops/check.hpp"
#include "ops/dispatch.hpp"
#include "ops/rows.hpp"
#include "qat/core/error.hpp"

namespace qat::ops {
namespace {

using std::string_view;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

using Forward = at::Tensor(const at::Tensor&, string_view, const OptionalTensor&, string_view);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, string_view);
using Both = std::tuple<at::Tensor, at::Tensor>;
using BackwardScale = Both(const at::Tensor&, const at::Tensor&, const at::Tensor&, string_view);

c10::TypedOperatorHandle<Forward> forward_operator() {
  static const auto op = find_operator<Forward>("libqat::fake_quantize_activation");
  return op;
}

c10::TypedOperatorHandle<Backward> backward_operator() {
  static const auto op = find_operator<Backward>("libqat::fake_quantize_activation_backward");
  return op;
}

c10::TypedOperatorHandle<BackwardScale> backward_scale_operator() {
  static const auto op = find_operator<BackwardScale>("libqat::fake_quantize_activation_backward_scale");
  return op;
}

void check_scale(const Subject& subject, const at::Tensor& scale, const at::Tensor& input) {
  if (scale.scalar_type() != at::kFloat || scale.dim() != 0 || scale.device() != input.device()) {
    fail(subject, "a scale of float32[] on " + input.device().str(),
         describe(scale) + " on " + scale.device().str());
  }
}

void check_forward(const at::Tensor& input, string_view format, const OptionalTensor& scale,
                   string_view tensor) {
  const Subject subject{"fake_quantize_activation", tensor};
  check_activation_format(format);
  const at::ScalarType dtype = input.scalar_type();
  if ((dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) || input.dim() == 0) {
    fail(subject, "an input of float32, bfloat16 or float16 of at least 1 dimension", describe(input));
  }
  const bool wanted = format == kInt8TensorStatic;
  if (scale.has_value() != wanted) {
    fail(subject, (wanted ? "a scale for " : "no scale for ") + std::string(format), wanted ? "none" : "one");
  }
  if (scale) check_scale(subject, *scale, input);
  if (format == kQ8_0 && (input.sym_size(-1) % 32).sym_ne(0).guard_bool(__FILE__, __LINE__)) {
    fail(subject, "a last dimension that blocks of 32 (q8_0) divide", describe(input));
  }
}

void check_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& scale,
                    string_view tensor) {
  const Subject subject{"fake_quantize_activation_backward", tensor};
  if (grad.scalar_type() != input.scalar_type() || grad.sym_sizes() != input.sym_sizes() ||
      grad.device() != input.device()) {
    fail(subject, "a gradient like the input " + describe(input), describe(grad));
  }
  check_scale(subject, scale, input);
}

/// A scale in the dtype of the activations, 1 where it is 0, and whether it is not.
struct StaticScale {
  at::Tensor value;
  at::Tensor calibrated;

  StaticScale(const at::Tensor& scale, at::ScalarType dtype) : value(scale.to(dtype)) {
    calibrated = value != 0;
    value = at::where(calibrated, value, at::ones_like(value));
  }
};

at::Tensor static_values(const at::Tensor& input, const at::Tensor& scale) {
  const StaticScale s(scale, input.scalar_type());
  // In place: logits are large.
  at::Tensor values = input / s.value;
  values.round_().clamp_(-128, 127).mul_(s.value);
  return at::where(s.calibrated, values, input);
}

/// bool[...]: where a gradient passes.
at::Tensor inside(const at::Tensor& input, const StaticScale& scale) {
  const at::Tensor code = (input / scale.value).round_();
  return code.ge(-128).logical_and_(code.le(127)).logical_or_(scale.calibrated.logical_not());
}

at::Tensor token_values(const at::Tensor& input) {
  const at::Tensor x = input.to(at::kFloat);
  const at::Tensor scale = at::amax(x.abs(), {-1}, /*keepdim=*/true).div_(127.0);
  const at::Tensor divisor = at::where(scale == 0, at::ones_like(scale), scale);
  return at::round(x / divisor).mul_(divisor).to(input.scalar_type());
}

at::Tensor block_values(const at::Tensor& input, string_view tensor) {
  const int64_t width = input.size(-1);
  const at::Tensor x = input.to(at::kCPU, at::kFloat).contiguous();
  const at::Tensor x_hat = at::empty_like(x);
  const at::Tensor rows = x_hat.view({x.numel() / width, width});
  quantize_rows({"fake_quantize_activation", tensor}, grid::find(kQ8_0), Scales{}, x.view(rows.sizes()),
                rows);
  return x_hat.to(input.options());
}

// Arithmetic inside a kernel must not be cast once more.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

at::Tensor forward(const at::Tensor& input, string_view format, const OptionalTensor& scale,
                   string_view tensor) {
  check_forward(input, format, scale, tensor);
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  if (input.numel() == 0) return at::empty_like(input, at::MemoryFormat::Contiguous);
  const at::Tensor x = input.contiguous();
  if (format == kInt8TensorStatic) return static_values(x, *scale);
  return format == kInt8Token ? token_values(x) : block_values(x, tensor);
}

at::Tensor forward_meta(const at::Tensor& input, string_view format, const OptionalTensor& scale,
                        string_view tensor) {
  check_forward(input, format, scale, tensor);
  return at::empty_like(input, at::MemoryFormat::Contiguous);
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& scale,
                    string_view tensor) {
  check_backward(grad, input, scale, tensor);
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const StaticScale s(scale, input.scalar_type());
  return at::where(inside(input.contiguous(), s), grad.contiguous(), 0.0);
}

at::Tensor backward_meta(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& scale,
                         string_view tensor) {
  check_backward(grad, input, scale, tensor);
  return at::empty_like(grad, at::MemoryFormat::Contiguous);
}

Both backward_scale(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& scale,
                    string_view tensor) {
  check_backward(grad, input, scale, tensor);
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const StaticScale s(scale, input.scalar_type());
  const at::Tensor ratio = input.contiguous() / s.value, code = at::round(ratio);
  const at::Tensor inside = code.ge(-128).logical_and_(code.le(127));
  const at::Tensor passed = grad.contiguous(), none = at::zeros_like(passed);
  const at::Tensor steps =
      at::clamp(code, -128, 127).to(at::kFloat).sub_(at::where(inside, ratio, none).to(at::kFloat));
  const at::Tensor sum = steps.mul_(passed).sum();
  const double shared = 127.0 * static_cast<double>(input.size(-1));
  return {at::where(inside.logical_or(s.calibrated.logical_not()), passed, none),
          at::where(s.calibrated, sum / std::sqrt(shared), at::zeros_like(sum))};
}

Both backward_scale_meta(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& scale,
                         string_view tensor) {
  check_backward(grad, input, scale, tensor);
  return {at::empty_like(grad, at::MemoryFormat::Contiguous), at::empty_like(scale)};
}

class FakeQuantizeActivation : public torch::autograd::Function<FakeQuantizeActivation> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, string_view format,
                            const OptionalTensor& scale, string_view tensor) {
    context->saved_data["tensor"] = std::string(tensor);
    if (scale) context->save_for_backward({input, *scale});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(input, format, scale, tensor);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    if (saved.empty()) return {grads[0], {}, {}, {}};
    const string_view tensor = context->saved_data["tensor"].toStringView();
    if (context->needs_input_grad(1)) {
      auto [by_input, by_scale] = backward_scale_operator().call(grads[0], saved[0], saved[1], tensor);
      return {std::move(by_input), {}, std::move(by_scale), {}};
    }
    return {backward_operator().call(grads[0], saved[0], saved[1], tensor), {}, {}, {}};
  }
};

at::Tensor forward_autograd(const at::Tensor& input, string_view format, const OptionalTensor& scale,
                            string_view tensor) {
  return FakeQuantizeActivation::apply(input, format, scale, tensor);
}

template <at::DeviceType device>
at::Tensor forward_autocast(const at::Tensor& input, string_view format, const OptionalTensor& scale,
                            string_view tensor) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return forward_operator().call(at::autocast::cached_cast(dtype, input, device), format, scale, tensor);
}

TORCH_LIBRARY_IMPL(libqat, Meta, m) {
  m.impl("fake_quantize_activation", forward_meta);
  m.impl("fake_quantize_activation_backward", backward_meta);
  m.impl("fake_quantize_activation_backward_scale", backward_scale_meta);
}

TORCH_LIBRARY_IMPL(libqat, CompositeExplicitAutograd, m) {
  m.impl("fake_quantize_activation", forward);
  m.impl("fake_quantize_activation_backward", backward);
  m.impl("fake_quantize_activation_backward_scale", backward_scale);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("fake_quantize_activation", forward_autograd);
  m.impl("fake_quantize_activation_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("fake_quantize_activation_backward_scale", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(libqat, AutocastCPU, m) {
  m.impl("fake_quantize_activation", forward_autocast<at::kCPU>);
}

TORCH_LIBRARY_IMPL(libqat, AutocastCUDA, m) {
  m.impl("fake_quantize_activation", forward_autocast<at::kCUDA>);
}

}  // namespace

at::Tensor fake_quantize_activation(const at::Tensor& input, string_view format, const OptionalTensor& scale,
                                    string_view tensor) {
  return forward_operator().call(input, format, scale, tensor);
}

at::Tensor fake_quantize_activation_backward(const at::Tensor& grad, const at::Tensor& input,
                                             const at::Tensor& scale, string_view tensor) {
  return backward_operator().call(grad, input, scale, tensor);
}

Both fake_quantize_activation_backward_scale(const at::Tensor& grad, const at::Tensor& input,
                                             const at::Tensor& scale, string_view tensor) {
  return backward_scale_operator().call(grad, input, scale, tensor);
}

}  // namespace qat::ops
