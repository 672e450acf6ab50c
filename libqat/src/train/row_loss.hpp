#pragma once

// The objective of rows of logits, whatever makes them and wherever the teacher's side comes from.

#include <ATen/core/Tensor.h>

#include "qat/train/objective.hpp"

namespace qat::train {

/// The teacher's side of n rows: logits float[n, V]; or ids int64[n, k] with log_p float32[n, k + 1]; or
/// nothing.
struct RowTeacher {
  at::Tensor logits;
  at::Tensor ids, log_p;
  RowTeacher slice(int64_t first, int64_t last) const;
};

struct RowLoss {
  Objective objective;   ///< with cakld_beta given where cakld is above 0
  double positions = 0;  ///< N, of the whole micro-batch
  at::ScalarType compute = at::kFloat;

  double share() const noexcept { return objective.temperature / positions; }
  /// Adds the loss of each row to `loss`, float64[n], and writes its gradient. student: float[n, V]; target:
  /// int64[n]; gradient: float[n, V], undefined, or `student` itself. Rows are independent of one another.
  void operator()(const at::Tensor& student, const RowTeacher& teacher, const at::Tensor& target,
                  const at::Tensor& loss, const at::Tensor& gradient) const;
};

/// Log-probabilities float[n, V] at `temperature`, in `compute`.
at::Tensor log_probabilities(const at::Tensor& logits, at::ScalarType compute, double temperature);

/// The sum over rows of the probability that logits float[n, V] give to `target`, int64[n].
double confidence(const at::Tensor& logits, const at::Tensor& target, at::ScalarType compute);

}  // namespace qat::train
