#pragma once

// Argument checks that all operators share. They read symbolic sizes, so meta kernels make them too.

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <string>
#include <string_view>

#include "qat/core/scheme.hpp"
#include "qat/grid/grid.hpp"

namespace qat::ops {

/// What a message names: the operator and the weight.
struct Subject {
  std::string_view op;
  std::string_view tensor;  ///< parameter name; may be empty
};

/// "op: tensor"; "weight" stands for a tensor without a name.
std::string to_string(const Subject& subject);

/// Throws ArgumentError "op: tensor: expected ..., got ...".
[[noreturn]] void fail(const Subject& subject, const std::string& expected, const std::string& got);

/// "BFloat16[2, 3]".
std::string describe(const at::Tensor& tensor);

/// N, the weights in a row of [R, ...].
c10::SymInt row_size(const at::Tensor& weight);

/// A latent must be a non-empty float32[R, ...] whose rows the grid divides. Returns the grid.
const grid::Grid& check_weight(const Subject& subject, const at::Tensor& weight, std::string_view grid);

/// As check_weight, for layers whose weight is a matrix.
const grid::Grid& check_matrix(const Subject& subject, const at::Tensor& weight, std::string_view grid);

/// `value` must be float32, bfloat16 or float16, of `last` elements in its last dimension, on weight's
/// device. `what` names the argument.
void check_activation(const Subject& subject, const char* what, const at::Tensor& value,
                      const c10::SymInt& last, const at::Tensor& weight);

/// `value` must be float32 of weight's shape.
void check_like_weight(const Subject& subject, const char* what, const at::Tensor& value,
                       const at::Tensor& weight);

}  // namespace qat::ops
