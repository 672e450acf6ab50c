#pragma once

// Argument checks that the methods share.

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "qat/grid/grid.hpp"

namespace qat::ptq {

/// What a message names: the function and the weight.
struct Subject {
  std::string_view function;
  std::string_view tensor;  ///< parameter name; may be empty
};

/// "function: tensor"; "weight" stands for a tensor without a name.
std::string to_string(const Subject& subject);

/// Throws ArgumentError "function: tensor: expected ..., got ...".
[[noreturn]] void fail(const Subject& subject, const std::string& expected, const std::string& got);

/// Throws NumericError "function: tensor: row 7 is not finite".
[[noreturn]] void fail_row(const Subject& subject, int64_t row, grid::Status status);

/// Throws NumericError unless all values are finite. `what` names the tensor's role.
void check_finite(const Subject& subject, const char* what, const at::Tensor& values);

/// "float[2, 3]".
std::string describe(const at::Tensor& tensor);

/// A weight must be float32[R, ...] and not empty, the grid one with codes that divides its rows. Returns the
/// grid.
const grid::Grid& check_weight(const Subject& subject, const at::Tensor& weight, std::string_view grid);

/// `value` must be float32 or float64 of that shape and finite. Returns it as contiguous float64 on the CPU.
at::Tensor checked_statistics(const Subject& subject, const char* what, const at::Tensor& value,
                              at::IntArrayRef shape);

/// float32[R, N] of a weight's rows on the CPU, contiguous, without a gradient.
at::Tensor rows_of(const at::Tensor& weight);

}  // namespace qat::ptq
