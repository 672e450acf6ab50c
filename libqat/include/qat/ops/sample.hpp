#pragma once

// Ids drawn from what a language model says.

#include <ATen/core/Tensor.h>

namespace qat {

/// An id for each row of logits[n, V] with its probability, int64[n] on the logits' device.
///
/// uniform: float64[n], evenly drawn from [0, 1), one number for a row, where multinomial draws one for each
/// id: the id is the first whose cumulated probability exceeds it. Probabilities are float32 (float64 of
/// float64 logits), their sums float64. ArgumentError for other shapes and dtypes; NumericError for logits
/// that are not finite in sum.
at::Tensor sample(const at::Tensor& logits, const at::Tensor& uniform);

}  // namespace qat
