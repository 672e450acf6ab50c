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

#include "train/divergence.hpp"

namespace qat::train {
namespace {

/// Logits scored at a time: the half dozen float32 temporaries of a block then stay in a core's cache.
constexpr int64_t kBlockLogits = int64_t{1} << 16;

at::Tensor scaled(const at::Tensor& logits, at::ScalarType compute, double temperature) {
  const at::Tensor wide = logits.to(compute);
  return temperature == 1 ? wide : wide / temperature;
}

/// The teacher's terms over the outcomes "token ids[0]", ..., "token ids[k - 1]", "another token", from
/// logits float[n, V]. The rest's probability is a sum over the rest, never 1 minus a sum.
void add_top(const RowLoss& rule, const at::Tensor& logits, const RowTeacher& teacher, const at::Tensor& loss,
             const at::Tensor& gradient) {
  const at::Tensor z = scaled(logits, rule.compute, rule.objective.temperature);
  const at::Tensor top = z.gather(1, teacher.ids);
  const at::Tensor rest = z.scatter(1, teacher.ids, -std::numeric_limits<double>::infinity());
  const at::Tensor rest_sum = at::logsumexp(rest, 1, /*keepdim=*/true);
  const at::Tensor sum = at::logaddexp(rest_sum, at::logsumexp(top, 1, /*keepdim=*/true));
  const at::Tensor log_q = at::cat({top, rest_sum}, 1).sub_(sum);
  // Stored numbers are rounded: make them probabilities again.
  const at::Tensor log_p = at::_log_softmax(teacher.log_p.to(rule.compute), 1, false);
  at::Tensor outcome;  // the gradient by the outcomes' logits
  if (gradient.defined()) outcome = at::zeros(log_q.sizes(), log_q.options());
  add_divergences(rule.objective, rule.share(), log_p, log_q, loss, outcome);
  if (!gradient.defined()) return;
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
  if (objective.needs_teacher() && teacher.ids.defined()) {
    add_top(rule, student, teacher, loss, sum);
  } else if (objective.needs_teacher()) {
    log_q = log_probabilities(student, rule.compute, objective.temperature);
    const at::Tensor log_p = log_probabilities(teacher.logits, rule.compute, objective.temperature);
    add_divergences(objective, rule.share(), log_p, log_q, loss, sum);
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

/// Calls work(first, last) for blocks of rows of a [rows, columns] tensor that stay in a core's cache.
template <class Work>
void for_blocks(const at::Tensor& matrix, const Work& work) {
  const int64_t rows = matrix.size(0);
  if (!matrix.is_cpu()) {
    work(0, rows);
    return;
  }
  const int64_t height = std::clamp<int64_t>(kBlockLogits / matrix.size(1), 1, rows);
  at::parallel_for(0, (rows + height - 1) / height, 1, [&](int64_t begin, int64_t end) {
    const c10::NoGradGuard no_grad;  // thread-local, and this may be a worker thread
    for (int64_t block = begin; block < end; ++block) {
      work(block * height, std::min((block + 1) * height, rows));
    }
  });
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
  const c10::NoGradGuard no_grad;
  for_blocks(student, [&](int64_t first, int64_t last) {
    solve_block(*this, cut(student, first, last), teacher.slice(first, last), cut(target, first, last),
                cut(loss, first, last), cut(gradient, first, last));
  });
}

double confidence(const at::Tensor& logits, const at::Tensor& target, at::ScalarType compute) {
  const c10::NoGradGuard no_grad;
  const at::Tensor each = at::zeros({logits.size(0)}, logits.options().dtype(at::kDouble));
  for_blocks(logits, [&](int64_t first, int64_t last) {
    const at::Tensor log_p = log_probabilities(cut(logits, first, last), compute, 1);
    cut(each, first, last).copy_(log_p.gather(1, cut(target, first, last).unsqueeze(1)).squeeze(1).exp_());
  });
  return each.sum().item<double>();
}

}  // namespace qat::train
