#pragma once

// How far two distributions over the same outcomes are apart, and the gradient by the student's logits.

#include <ATen/core/Tensor.h>

#include "qat/train/objective.hpp"

namespace qat::train {

/// Adds the teacher's terms of `objective` for n rows of m outcomes. log_p, log_q: the log-probabilities
/// float[n, m] of teacher and student at the objective's temperature t. share: t / N. loss: float64[n];
/// gradient: float[n, m] by the student's logits before they were divided by t, or undefined. cakld_beta must
/// be given.
void add_divergences(const Objective& objective, double share, const at::Tensor& log_p,
                     const at::Tensor& log_q, const at::Tensor& loss, const at::Tensor& gradient);

}  // namespace qat::train
