#pragma once

// The operators of a quantized linear layer, as kernels and gradients call them.

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "ops/dispatch.hpp"

namespace qat::ops::linear {

using std::string_view;
using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

// Matrix products inside a kernel must not be cast once more: backward may run under another autocast state
// than forward did.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, string_view,
                           string_view, string_view, string_view, const OptionalTensor&, string_view);
using GradInput = at::Tensor(const at::Tensor&, const at::Tensor&, string_view, string_view, string_view,
                             const OptionalTensor&);
using GradWeight = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, string_view,
                              string_view, string_view, string_view, const OptionalTensor&);
using GradScales = TwoTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                              string_view, string_view, string_view, string_view);

inline c10::TypedOperatorHandle<Forward> forward_operator() {
  static const auto op = find_operator<Forward>("libqat::quantized_linear");
  return op;
}

inline c10::TypedOperatorHandle<GradInput> grad_input_operator() {
  static const auto op = find_operator<GradInput>("libqat::quantized_linear_grad_input");
  return op;
}

inline c10::TypedOperatorHandle<GradWeight> grad_weight_operator() {
  static const auto op = find_operator<GradWeight>("libqat::quantized_linear_grad_weight");
  return op;
}

inline c10::TypedOperatorHandle<GradScales> grad_scales_operator() {
  static const auto op = find_operator<GradScales>("libqat::quantized_linear_grad_scales");
  return op;
}

}  // namespace qat::ops::linear
