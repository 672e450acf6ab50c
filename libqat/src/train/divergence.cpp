#include "train/divergence.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/logaddexp.h>

#include <cmath>

namespace qat::train {
namespace {

/// sum_v a (log a - log b) of each row, where 0 log 0 is 0.
at::Tensor divergence(const at::Tensor& log_a, const at::Tensor& a, const at::Tensor& log_b) {
  const at::Tensor sum = (log_a - log_b).mul_(a).sum(1);
  if (!sum.isnan().any().item<bool>()) return sum;
  // An outcome may be ruled out: its term is 0 * -inf. Other NaN stay.
  return (log_a - log_b).masked_fill_(log_a.isneginf(), 0).mul_(a).sum(1);
}

/// One divergence of a student q from something else.
struct Term {
  double weight;       ///< of its gradient
  double temperature;  ///< the loss has this factor more
};

/// weight * t * KL(p || q), whose gradient is weight * (q - p).
void add_forward(const Term& term, const at::Tensor& log_p, const at::Tensor& p, const at::Tensor& log_q,
                 const at::Tensor& loss, const at::Tensor& gradient) {
  if (gradient.defined()) gradient.add_(log_q.exp().sub_(p), term.weight);
  loss.add_(divergence(log_p, p, log_q), term.weight * term.temperature);
}

/// weight * t * KL(q || b), whose gradient is weight * q (log(q/b) - KL(q || b)), also when b = m depends on
/// q and the divergence of p from m is part of the sum.
void add_reverse(const Term& term, const at::Tensor& log_q, const at::Tensor& log_b, const at::Tensor& loss,
                 const at::Tensor& gradient) {
  const at::Tensor q = log_q.exp();
  const at::Tensor ratio = (log_q - log_b).masked_fill_(log_q.isneginf(), 0);
  const at::Tensor sum = (ratio * q).sum(1, /*keepdim=*/true);
  loss.add_(sum.squeeze(1), term.weight * term.temperature);
  if (gradient.defined()) gradient.add_((ratio - sum).mul_(q), term.weight);
}

}  // namespace

Objective Objective::times(double factor) const noexcept {
  Objective result = *this;
  for (double* weight : {&result.kl, &result.ce, &result.reverse_kl, &result.jsd, &result.cakld}) {
    *weight *= factor;
  }
  return result;
}

void add_divergences(const Objective& objective, double share, const at::Tensor& log_p,
                     const at::Tensor& log_q, const at::Tensor& loss, const at::Tensor& gradient) {
  const double t = objective.temperature, a = objective.jsd_alpha;
  const double towards = objective.cakld > 0 ? objective.cakld * objective.cakld_beta : 0;
  const double forward = objective.kl + objective.cakld - towards, reverse = objective.reverse_kl + towards;
  const at::Tensor p = log_p.exp();
  // NaN, from a teacher of NaN, must stay one.
  if (forward != 0) add_forward({share * forward, t}, log_p, p, log_q, loss, gradient);
  if (reverse != 0) add_reverse({share * reverse, t}, log_q, log_p, loss, gradient);
  if (objective.jsd > 0) {
    const at::Tensor log_m = at::logaddexp(log_p + std::log(a), log_q + std::log1p(-a));
    loss.add_(divergence(log_p, p, log_m), share * objective.jsd * a * t);
    add_reverse({share * objective.jsd * (1 - a), t}, log_q, log_m, loss, gradient);
  }
}

}  // namespace qat::train
