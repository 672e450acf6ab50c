#include "fused.hpp"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <type_traits>
#include <utility>

#include "qat/core/error.hpp"
#include "row_kernels.hpp"

namespace qat::models {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

/// Elements that a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;

bool has_kernel(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.device().is_cpu() && (dtype == at::kFloat || dtype == at::kBFloat16);
}

void refuse_double_backward(const char* function) {
  if (at::GradMode::is_enabled()) {
    throw UnsupportedError(std::string(function) + ": gradient: expected a first derivative, got a second");
  }
}

/// The row kernels' view of a tensor's data: float or bfloat16 bits.
template <class T>
using Element = std::conditional_t<std::is_same_v<T, float>, float, kernels::BFloat16Bits>;

template <class T>
const Element<T>* source(const at::Tensor& tensor) {
  return reinterpret_cast<const Element<T>*>(tensor.const_data_ptr<T>());
}

template <class T>
Element<T>* target(at::Tensor& tensor) {
  return reinterpret_cast<Element<T>*>(tensor.mutable_data_ptr<T>());
}

/// body(float()) or body(at::BFloat16()): the dtypes that `has_kernel` lets through.
template <class Body>
void dispatch(at::ScalarType dtype, Body body) {
  dtype == at::kFloat ? body(float()) : body(at::BFloat16());
}

/// body(row) for every row of `width` elements.
template <class Body>
void for_rows(int64_t rows, int64_t width, Body body) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

struct RmsNormFunction : Function<RmsNormFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight,
                            double eps, at::ScalarType dtype) {
    const at::Tensor x = input.contiguous();
    const int64_t n = x.size(-1);
    const int64_t rows = x.numel() / n;
    at::Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
    at::Tensor inverse = at::empty({rows}, x.options());
    dispatch(dtype, [&]<class T>(T) {
      const float* from = x.const_data_ptr<float>();
      const float* gains = weight.const_data_ptr<float>();
      Element<T>* to = target<T>(y);
      float* r = inverse.mutable_data_ptr<float>();
      for_rows(rows, n, [&](int64_t row) {
        r[row] = kernels::rms_norm(from + row * n, gains, n, static_cast<float>(eps), to + row * n);
      });
    });
    context->save_for_backward({x, weight, inverse});
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    refuse_double_backward("rms_norm");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &inverse = saved[2];
    const at::Tensor grad_y = grads[0].contiguous();
    const int64_t n = x.size(-1);
    const int64_t rows = x.numel() / n;
    at::Tensor grad_x = at::empty_like(x);
    // One partial sum of the gain's gradient per fixed group of rows: the result does not depend on threads.
    constexpr int64_t kGroup = 32;
    const int64_t groups = (rows + kGroup - 1) / kGroup;
    at::Tensor partial = at::zeros({groups, n}, x.options());
    dispatch(grad_y.scalar_type(), [&]<class T>(T) {
      const float* from = x.const_data_ptr<float>();
      const float* gains = weight.const_data_ptr<float>();
      const float* r = inverse.const_data_ptr<float>();
      const Element<T>* grad = source<T>(grad_y);
      float* to = grad_x.mutable_data_ptr<float>();
      float* gain_grads = partial.mutable_data_ptr<float>();
      for_rows(groups, n * kGroup, [&](int64_t group) {
        for (int64_t row = group * kGroup; row < std::min(rows, (group + 1) * kGroup); ++row) {
          kernels::rms_norm_backward(from + row * n, gains, grad + row * n, n, r[row], to + row * n,
                                     gain_grads + group * n);
        }
      });
    });
    return {grad_x, partial.sum(0), at::Tensor(), at::Tensor()};
  }
};

/// x: [..., T, H, D] contiguous, turned by the angles (forward) or back (gradient).
at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t half = cos.size(1);
  const int64_t tokens = cos.size(0);
  const int64_t heads = x.size(-2);
  at::Tensor y = at::empty_like(x);
  dispatch(x.scalar_type(), [&]<class T>(T) {
    const Element<T>* from = source<T>(x);
    Element<T>* to = target<T>(y);
    const float* c = cos.const_data_ptr<float>();
    const float* s = sin.const_data_ptr<float>();
    for_rows(x.numel() / (heads * 2 * half), heads * 2 * half, [&](int64_t row) {
      const int64_t angle = row % tokens * half;
      for (int64_t head = row * heads; head < (row + 1) * heads; ++head) {
        kernels::rotate(from + head * 2 * half, c + angle, s + angle, half, to + head * 2 * half);
      }
    });
  });
  return y;
}

struct RotateFunction : Function<RotateFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    context->save_for_backward({cos, sin});
    return rotated(x.contiguous(), cos, sin);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    refuse_double_backward("rotate");
    const variable_list saved = context->get_saved_variables();
    return {rotated(grads[0].contiguous(), saved[0], saved[1].neg()), at::Tensor(), at::Tensor()};
  }
};

template <Activation kind, class T>
void gated_row(const T* gate, const T* up, int64_t n, T* y) {
  kind == Activation::kSilu ? kernels::silu_mul(gate, up, n, y) : kernels::gelu_mul(gate, up, n, y);
}

template <Activation kind, class T>
void gated_backward_row(const T* gate, const T* up, const T* grad, int64_t n, T* grad_gate, T* grad_up) {
  kind == Activation::kSilu ? kernels::silu_mul_backward(gate, up, grad, n, grad_gate, grad_up)
                            : kernels::gelu_mul_backward(gate, up, grad, n, grad_gate, grad_up);
}

template <Activation kind>
struct GatedFunction : Function<GatedFunction<kind>> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate_input,
                            const at::Tensor& up_input) {
    const at::Tensor gate = gate_input.contiguous();
    const at::Tensor up = up_input.contiguous();
    at::Tensor y = at::empty_like(gate);
    const int64_t n = gate.size(-1);
    dispatch(gate.scalar_type(), [&]<class T>(T) {
      const Element<T>*g = source<T>(gate), *u = source<T>(up);
      Element<T>* to = target<T>(y);
      for_rows(gate.numel() / n, n,
               [&](int64_t row) { gated_row<kind>(g + row * n, u + row * n, n, to + row * n); });
    });
    context->save_for_backward({gate, up});
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    refuse_double_backward("gated");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &gate = saved[0], &up = saved[1];
    const at::Tensor grad_y = grads[0].contiguous();
    at::Tensor grad_gate = at::empty_like(gate);
    at::Tensor grad_up = at::empty_like(up);
    const int64_t n = gate.size(-1);
    dispatch(gate.scalar_type(), [&]<class T>(T) {
      const Element<T>*g = source<T>(gate), *u = source<T>(up), *grad = source<T>(grad_y);
      Element<T>*to_gate = target<T>(grad_gate), *to_up = target<T>(grad_up);
      for_rows(gate.numel() / n, n, [&](int64_t row) {
        const int64_t at = row * n;
        gated_backward_row<kind>(g + at, u + at, grad + at, n, to_gate + at, to_up + at);
      });
    });
    return {grad_gate, grad_up};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, at::ScalarType dtype) {
  if (x.scalar_type() == at::kFloat && has_kernel(x, dtype)) {
    return RmsNormFunction::apply(x, weight.to(at::kFloat).contiguous(), eps, dtype);
  }
  return (weight * (x * at::rsqrt((x * x).mean(-1, true) + eps))).to(dtype);
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  if (has_kernel(x, x.scalar_type())) return RotateFunction::apply(x, cos, sin);
  const auto halves = x.chunk(2, -1);
  const at::Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1);
  const at::Tensor first = halves[0] * c - halves[1] * s, second = halves[1] * c + halves[0] * s;
  return at::cat({first, second}, -1).to(x.scalar_type());
}

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up, Activation activation) {
  const bool silu = activation == Activation::kSilu;
  if (has_kernel(gate, gate.scalar_type())) {
    return silu ? GatedFunction<Activation::kSilu>::apply(gate, up)
                : GatedFunction<Activation::kGeluTanh>::apply(gate, up);
  }
  return (silu ? at::silu(gate) : at::gelu(gate, "tanh")) * up;
}

}  // namespace qat::models
