#pragma once

// Argument checks that the methods share.

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "ops/rows.hpp"

namespace qat::ptq {

using ops::describe;
using ops::fail;
using ops::fail_row;
using ops::FirstFailure;
using ops::for_each_row;
using ops::Subject;

/// Throws NumericError unless all values are finite. `what` names the tensor's role.
void check_finite(const Subject& subject, const char* what, const at::Tensor& values);

/// A weight must be float32[R, ...] and not empty, the grid one with codes that divides its rows. Returns the
/// grid.
const grid::Grid& check_coded(const Subject& subject, const at::Tensor& weight, std::string_view grid);

/// `value` must be float32 or float64 of that shape and finite. Returns it as contiguous float64 on the CPU.
at::Tensor checked_statistics(const Subject& subject, const char* what, const at::Tensor& value,
                              at::IntArrayRef shape);

/// `outputs` must be finite float32[K, S, S], of K groups of S of a weight's rows, the last of which may be
/// smaller (see OutputCurvatures). Returns K.
int64_t check_outputs(const Subject& subject, const at::Tensor& outputs, int64_t rows);

/// float32[R, N] of a weight's rows on the CPU, contiguous, without a gradient.
at::Tensor rows_of(const at::Tensor& weight);

}  // namespace qat::ptq
