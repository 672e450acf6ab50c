#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/log.h>
#include <ATen/ops/nll_loss.h>

#include "qat/train/objective.hpp"

/// The objective by its definition, from ordinary differentiable operators. log_p, log_q: [n, m] of teacher
/// and student at the temperature; log_q_1: [n, V] of the student at temperature 1; target: int64[n];
/// certainty: the teacher's mean probability of the targets.
inline at::Tensor plain_objective(const qat::train::Objective& objective, const at::Tensor& log_p,
                                  const at::Tensor& log_q, const at::Tensor& log_q_1,
                                  const at::Tensor& target, double certainty) {
  const auto divergence = [](const at::Tensor& log_a, const at::Tensor& log_b) {
    return (log_a.exp() * (log_a - log_b)).sum(-1).mean();
  };
  const double a = objective.jsd_alpha;
  const double b = objective.cakld_beta < 0 ? certainty : objective.cakld_beta;
  const at::Tensor log_m = at::log(a * log_p.exp() + (1 - a) * log_q.exp());
  const at::Tensor forward = divergence(log_p, log_q), reverse = divergence(log_q, log_p);
  const at::Tensor jsd = a * divergence(log_p, log_m) + (1 - a) * divergence(log_q, log_m);
  const at::Tensor terms = objective.kl * forward + objective.reverse_kl * reverse + objective.jsd * jsd +
                           objective.cakld * (b * reverse + (1 - b) * forward);
  return terms * objective.temperature * objective.temperature + objective.ce * at::nll_loss(log_q_1, target);
}

/// Each term alone, and mixes: {kl, ce, temperature, reverse_kl, jsd, jsd_alpha, cakld, cakld_beta}.
inline const std::vector<qat::train::Objective>& all_objectives() {
  static const std::vector<qat::train::Objective> objectives = {
      {1, 0, 1},
      {0, 1, 1},
      {0.7, 0.3, 1},
      {1, 0, 2.5},
      {0.4, 0.6, 0.5},
      {0, 2, 3},
      {0, 0, 1, 1},
      {0, 0, 2, 0.5},
      {0, 0, 1, 0, 1},
      {0, 0, 1.2, 0, 1, 0.85},
      {0, 0, 1, 0, 1, 1e-3},
      {0, 0, 1, 0, 0, 0.5, 1, 0.3},
      {0, 0, 2, 0, 0, 0.5, 1, 0},
      {0, 0, 1, 0, 0, 0.5, 1},
      {0, 0, 1.5, 0, 0, 0.5, 0.5},
      {0.1, 0.2, 1.5, 0.3, 0.4, 0.25, 0.5, 1},
      {0.1, 0.2, 1.5, 0.3, 0.4, 0.25, 0.5},
  };
  return objectives;
}
