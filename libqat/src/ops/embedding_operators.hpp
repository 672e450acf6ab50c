#pragma once

// The operators of a quantized embedding, as kernels and gradients call them.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "ops/dispatch.hpp"

namespace qat::ops::embedding {

using std::string_view;
using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, string_view, string_view,
                           string_view, string_view, const OptionalTensor&, string_view);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, string_view,
                            string_view, string_view, string_view, const OptionalTensor&);
using BackwardScales = TwoTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                  int64_t, string_view, string_view, string_view, string_view);

inline c10::TypedOperatorHandle<Forward> forward_operator() {
  static const auto op = find_operator<Forward>("libqat::quantized_embedding");
  return op;
}

inline c10::TypedOperatorHandle<Backward> backward_operator() {
  static const auto op = find_operator<Backward>("libqat::quantized_embedding_backward");
  return op;
}

inline c10::TypedOperatorHandle<BackwardScales> backward_scales_operator() {
  static const auto op = find_operator<BackwardScales>("libqat::quantized_embedding_backward_scales");
  return op;
}

}  // namespace qat::ops::embedding
