// The gradients of quantized_embedding, and the functions that C++ calls.

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.hpp"
#include "ops/embedding_operators.hpp"
#include "qat/ops/quantized_embedding.hpp"

namespace qat::ops {
namespace {

using namespace embedding;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedEmbedding : public torch::autograd::Function<QuantizedEmbedding> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& indices, const at::Tensor& weight,
                            int64_t padding_idx, string_view grid, string_view estimator, string_view scale,
                            string_view tensor, const OptionalTensor& scales, string_view gradient_rule) {
    auto& data = context->saved_data;
    data["padding_idx"] = padding_idx;
    data["grid"] = std::string(grid);
    data["estimator"] = std::string(estimator);
    data["scale"] = std::string(scale);
    data["tensor"] = std::string(tensor);
    data["scale_gradient"] = std::string(gradient_rule);
    context->save_for_backward({indices, weight, scales.value_or(at::Tensor())});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(indices, weight, padding_idx, grid, estimator, scale, tensor, scales,
                                   gradient_rule);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    const auto saved = context->get_saved_variables();
    const at::Tensor &indices = saved[0], &weight = saved[1], &scales = saved[2];
    const int64_t padding_idx = data["padding_idx"].toInt();
    const string_view grid = data["grid"].toStringView(), tensor = data["tensor"].toStringView();
    const string_view estimator = data["estimator"].toStringView();
    variable_list result(9);
    if (scales.defined() && context->needs_input_grad(2)) {
      std::tie(result[1], result[7]) =
          backward_scales_operator().call(grads[0], indices, weight, scales, padding_idx, grid, estimator,
                                          data["scale_gradient"].toStringView(), tensor);
    } else {
      result[1] = backward_operator().call(grads[0], indices, weight, padding_idx, grid, estimator,
                                           data["scale"].toStringView(), tensor, optional_tensor(scales));
    }
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                            string_view grid, string_view estimator, string_view scale, string_view tensor,
                            const OptionalTensor& scales, string_view gradient_rule) {
  return QuantizedEmbedding::apply(indices, weight, padding_idx, grid, estimator, scale, tensor, scales,
                                   gradient_rule);
}

TORCH_LIBRARY_IMPL(libqat, Autograd, m) {
  m.impl("quantized_embedding", forward_autograd);
  m.impl("quantized_embedding_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("quantized_embedding_backward_scales", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

at::Tensor quantized_embedding(const at::Tensor& indices, const at::Tensor& weight, int64_t padding_idx,
                               string_view grid, const Estimator& estimator, string_view tensor,
                               const at::Tensor& scales) {
  return forward_operator().call(indices, weight, padding_idx, grid, to_string(estimator.kind),
                                 to_string(estimator.scale), tensor, optional_tensor(scales),
                                 to_string(estimator.scale_gradient));
}

at::Tensor quantized_embedding_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                        const at::Tensor& weight, int64_t padding_idx, string_view grid,
                                        const Estimator& estimator, string_view tensor,
                                        const at::Tensor& scales) {
  return backward_operator().call(grad_output, indices, weight, padding_idx, grid, to_string(estimator.kind),
                                  to_string(estimator.scale), tensor, optional_tensor(scales));
}

TwoTensors quantized_embedding_backward_scales(const at::Tensor& grad_output, const at::Tensor& indices,
                                               const at::Tensor& weight, const at::Tensor& scales,
                                               int64_t padding_idx, string_view grid,
                                               const Estimator& estimator, string_view tensor) {
  return backward_scales_operator().call(grad_output, indices, weight, scales, padding_idx, grid,
                                         to_string(estimator.kind), to_string(estimator.scale_gradient),
                                         tensor);
}

}  // namespace qat::ops
