#include "train/row_loss.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <limits>

namespace qat::train {
namespace {

/// Logits scored at a time: the half dozen float32 temporaries of a block then stay in a core's cache.
constexpr int64_t kBlockLogits = int64_t{1} << 16;

at::Tensor scaled(const at::Tensor& logits, at::ScalarType compute, double temperature) {
  const at::Tensor wide = logits.to(compute);
  return temperature == 1 ? wide : wide / temperature;
}

/// sum_v p_v (log p_v - log q_v) of each row, where 0 log 0 is 0.
at::Tensor divergence(const at::Tensor& log_p, const at::Tensor& p, const at::Tensor& log_q) {
  const at::Tensor kl = (log_p - log_q).mul_(p).sum(1);
  if (!kl.isnan().any().item<bool>()) return kl;
  // The teacher may rule a token out: its term is 0 * -inf. Other NaN stay.
  return (log_p - log_q).masked_fill_(log_p.isneginf(), 0).mul_(p).sum(1);
}

/// Adds kl * t^2/N * KL of each row to `loss` and kl * t/N * (q - p) to `gradient` (when defined).
void add_kl(const RowLoss& rule, const at::Tensor& log_q, const at::Tensor& teacher, const at::Tensor& loss,
            const at::Tensor& gradient) {
  const double t = rule.objective.temperature, scale = rule.objective.kl * t / rule.positions;
  const at::Tensor log_p = log_probabilities(teacher, rule.compute, t);
  const at::Tensor p = log_p.exp();
  if (gradient.defined()) gradient.add_(log_q.exp().sub_(p), scale);
  loss.add_(divergence(log_p, p, log_q), scale * t);
}

/// The same over the outcomes "token ids[0]", ..., "token ids[k - 1]", "another token", from logits float
/// [n, V]. The rest's probability is a sum over the rest, never 1 minus a sum.
void add_top_kl(const RowLoss& rule, const at::Tensor& logits, const RowTeacher& teacher,
                const at::Tensor& loss, const at::Tensor& gradient) {
  const double t = rule.objective.temperature, scale = rule.objective.kl * t / rule.positions;
  const at::Tensor z = scaled(logits, rule.compute, t);
  const at::Tensor top = z.gather(1, teacher.ids);
  const at::Tensor rest = z.scatter(1, teacher.ids, -std::numeric_limits<double>::infinity());
  const at::Tensor rest_sum = at::logsumexp(rest, 1, /*keepdim=*/true);
  const at::Tensor sum = at::logaddexp(rest_sum, at::logsumexp(top, 1, /*keepdim=*/true));
  const at::Tensor log_q = at::cat({top, rest_sum}, 1).sub_(sum);
  // Stored numbers are rounded: make them probabilities again.
  const at::Tensor log_p = at::_log_softmax(teacher.log_p.to(rule.compute), 1, false);
  const at::Tensor p = log_p.exp();
  loss.add_(divergence(log_p, p, log_q), scale * t);
  if (!gradient.defined()) return;
  const at::Tensor outcome = (log_q.exp() - p).mul_(scale);
  const int64_t k = teacher.ids.size(1);
  gradient.add_((rest - rest_sum).exp_().mul_(outcome.slice(1, k)));  // exp(-inf) = 0 at the k tokens
  gradient.scatter_add_(1, teacher.ids, outcome.slice(1, 0, k));
}

/// Adds ce/N * -log q[target] of each row to `loss` and ce/N * (q - onehot) to `gradient` (when defined).
void add_ce(const RowLoss& rule, const at::Tensor& log_q, const at::Tensor& target, const at::Tensor& loss,
            const at::Tensor& gradient) {
  const double scale = rule.objective.ce / rule.positions;
  const at::Tensor column = target.unsqueeze(1);
  loss.sub_(log_q.gather(1, column).squeeze(1), scale);
  if (!gradient.defined()) return;
  gradient.add_(log_q.exp(), scale);
  gradient.scatter_add_(1, column, at::zeros(column.sizes(), gradient.options()).sub_(scale));
}

void solve_block(const RowLoss& rule, const at::Tensor& student, const RowTeacher& teacher,
                 const at::Tensor& target, const at::Tensor& loss, const at::Tensor& gradient) {
  const Objective& objective = rule.objective;
  at::Tensor sum;  // of the terms' gradients
  if (gradient.defined()) sum = at::zeros(student.sizes(), student.options().dtype(rule.compute));
  at::Tensor log_q;
  if (objective.kl > 0 && teacher.ids.defined()) {
    add_top_kl(rule, student, teacher, loss, sum);
  } else if (objective.kl > 0) {
    log_q = log_probabilities(student, rule.compute, objective.temperature);
    add_kl(rule, log_q, teacher.logits, loss, sum);
  }
  if (objective.ce > 0) {
    if (!log_q.defined() || objective.temperature != 1) log_q = log_probabilities(student, rule.compute, 1);
    add_ce(rule, log_q, target, loss, sum);
  }
  if (gradient.defined()) gradient.copy_(sum);
}

at::Tensor cut(const at::Tensor& tensor, int64_t first, int64_t last) {
  return tensor.defined() ? tensor.slice(0, first, last) : tensor;
}

}  // namespace

RowTeacher RowTeacher::slice(int64_t first, int64_t last) const {
  return {cut(logits, first, last), cut(ids, first, last), cut(log_p, first, last)};
}

at::Tensor log_probabilities(const at::Tensor& logits, at::ScalarType compute, double temperature) {
  return at::_log_softmax(scaled(logits, compute, temperature), -1, false);
}

void RowLoss::operator()(const at::Tensor& student, const RowTeacher& teacher, const at::Tensor& target,
                         const at::Tensor& loss, const at::Tensor& gradient) const {
  const int64_t rows = student.size(0);
  const int64_t height =
      student.is_cpu() ? std::clamp<int64_t>(kBlockLogits / student.size(1), 1, rows) : rows;
  const auto work = [&](int64_t begin, int64_t end) {
    const c10::NoGradGuard no_grad;  // thread-local, and this may be a worker thread
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * height, last = std::min(first + height, rows);
      solve_block(*this, cut(student, first, last), teacher.slice(first, last), cut(target, first, last),
                  cut(loss, first, last), cut(gradient, first, last));
    }
  };
  const int64_t blocks = (rows + height - 1) / height;
  if (student.is_cpu()) {
    at::parallel_for(0, blocks, 1, work);
  } else {
    work(0, blocks);
  }
}

}  // namespace qat::train
