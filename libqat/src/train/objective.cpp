#include "qat/train/objective.hpp"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>

#include "qat/core/error.hpp"

namespace qat::train {
namespace {

/// Logits scored at a time: the half dozen float32 temporaries of a block then stay in a core's cache.
constexpr int64_t kBlockLogits = int64_t{1} << 16;

struct Problem {
  at::Tensor student, teacher, targets;  ///< detached; teacher may be undefined; targets: int64[B, T - 1]
  Objective objective;
  double positions = 0;  ///< N
  c10::ScalarType compute = at::kFloat;
  bool ruled_out = false;  ///< the teacher gives some token no probability at all: 0 log 0 must read 0
};

/// Rows [first, last) of window `b`.
at::Tensor rows(const at::Tensor& logits, int64_t b, int64_t first, int64_t last) {
  return logits.select(0, b).slice(0, first, last);
}

at::Tensor log_softmax(const at::Tensor& logits, c10::ScalarType compute, double temperature) {
  const at::Tensor wide = logits.to(compute);
  return at::_log_softmax(temperature == 1 ? wide : wide / temperature, -1, false);
}

/// Adds kl * t^2/N * KL of each row to `loss` and kl * t/N * (q - p) to `gradient` (when defined).
void add_kl(const Problem& problem, const at::Tensor& log_q, const at::Tensor& teacher,
            const at::Tensor& loss, const at::Tensor& gradient) {
  const double t = problem.objective.temperature, scale = problem.objective.kl * t / problem.positions;
  const at::Tensor log_p = log_softmax(teacher, problem.compute, t);
  const at::Tensor p = log_p.exp();
  if (gradient.defined()) gradient.add_(log_q.exp().sub_(p), scale);
  at::Tensor difference = log_p - log_q;
  if (problem.ruled_out) difference.masked_fill_(log_p.isneginf(), 0);
  loss.add_(difference.mul_(p).sum(1), scale * t);
}

/// Adds ce/N * -log q[target] of each row to `loss` and ce/N * (q - onehot) to `gradient` (when defined).
void add_ce(const Problem& problem, const at::Tensor& log_q, const at::Tensor& target, const at::Tensor& loss,
            const at::Tensor& gradient) {
  const double scale = problem.objective.ce / problem.positions;
  const at::Tensor column = target.unsqueeze(1);
  loss.sub_(log_q.gather(1, column).squeeze(1), scale);
  if (!gradient.defined()) return;
  gradient.add_(log_q.exp(), scale);
  gradient.scatter_add_(1, column, at::zeros(column.sizes(), gradient.options()).sub_(scale));
}

/// Positions [first, last) of window `b`: their losses into loss float64[B, T - 1], and their gradients.
void solve_block(const Problem& problem, int64_t b, int64_t first, int64_t last, const at::Tensor& loss,
                 const at::Tensor& gradient) {
  const Objective& objective = problem.objective;
  const at::Tensor student = rows(problem.student, b, first, last);
  const at::Tensor target = rows(problem.targets, b, first, last);
  const at::Tensor row_loss = rows(loss, b, first, last);
  at::Tensor row_gradient;
  if (gradient.defined()) row_gradient = at::zeros(student.sizes(), student.options().dtype(problem.compute));
  at::Tensor log_q;
  if (objective.kl > 0) {
    log_q = log_softmax(student, problem.compute, objective.temperature);
    add_kl(problem, log_q, rows(problem.teacher, b, first, last), row_loss, row_gradient);
  }
  if (objective.ce > 0) {
    if (!log_q.defined() || objective.temperature != 1) log_q = log_softmax(student, problem.compute, 1);
    add_ce(problem, log_q, target, row_loss, row_gradient);
  }
  if (gradient.defined()) rows(gradient, b, first, last).copy_(row_gradient);
}

/// The loss in float64; fills `gradient`, [B, T, V] in the student's dtype, when defined.
at::Tensor solve(const Problem& problem, const at::Tensor& gradient) {
  const int64_t positions = problem.targets.size(1), vocabulary = problem.student.size(2);
  const int64_t height = std::clamp<int64_t>(kBlockLogits / vocabulary, 1, positions);
  const int64_t blocks = (positions + height - 1) / height;
  const at::Tensor loss = at::zeros(problem.targets.sizes(), problem.student.options().dtype(at::kDouble));
  const auto work = [&](int64_t begin, int64_t end) {
    const c10::NoGradGuard no_grad;  // thread-local, and this may be a worker thread
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % blocks * height;
      solve_block(problem, block / blocks, first, std::min(first + height, positions), loss, gradient);
    }
  };
  if (gradient.defined()) gradient.slice(1, positions).zero_();
  if (problem.student.is_cpu()) {
    at::parallel_for(0, problem.targets.size(0) * blocks, 1, work);
  } else {
    work(0, problem.targets.size(0) * blocks);
  }
  return loss.sum();
}

class ObjectiveFunction : public torch::autograd::Function<ObjectiveFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& student,
                            Problem problem) {
    at::Tensor gradient;
    if (student.requires_grad()) gradient = at::empty_like(problem.student, at::MemoryFormat::Contiguous);
    at::Tensor loss = solve(problem, gradient);
    if (loss.isnan().item<bool>()) {
      problem.ruled_out = true;
      loss = solve(problem, gradient);
    }
    context->save_for_backward({gradient});
    return loss.to(problem.compute);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    if (c10::GradMode::is_enabled()) {
      throw UnsupportedError("objective_loss: backward: expected a first derivative, got a double backward");
    }
    const at::Tensor gradient = context->get_saved_variables()[0];
    const double scale = upstream[0].item<double>();
    return {scale == 1 ? gradient : gradient * scale, at::Tensor()};
  }
};

std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "nothing";
  std::ostringstream text;
  text << c10::toString(tensor.scalar_type()) << tensor.sizes();
  return text.str();
}

void check(bool ok, const char* subject, const std::string& expected, const at::Tensor& got) {
  if (ok) return;
  throw ArgumentError(std::string("objective_loss: ") + subject + ": expected " + expected + ", got " +
                      describe(got));
}

}  // namespace

at::Tensor objective_loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& tokens,
                          const Objective& objective) {
  check(tokens.defined() && tokens.dim() == 2 && tokens.scalar_type() == at::kLong && tokens.size(0) >= 1 &&
            tokens.size(1) >= 2,
        "tokens", "int64[B, T] with T >= 2", tokens);
  check(student.defined() && student.dim() == 3 && student.is_floating_point() &&
            student.sizes().slice(0, 2) == tokens.sizes() && student.size(2) >= 1,
        "student", "float logits [B, T, V] for tokens " + describe(tokens), student);
  Problem problem{student.detach(), {}, tokens.slice(1, 1).to(student.device()), objective};
  if (objective.kl > 0) {
    check(teacher.defined() && teacher.is_floating_point() && teacher.sizes() == student.sizes(), "teacher",
          "float logits like the student's " + describe(student), teacher);
    problem.teacher = teacher.detach();
  }
  problem.positions = static_cast<double>(problem.targets.numel());
  if (student.scalar_type() == at::kDouble) problem.compute = at::kDouble;
  return ObjectiveFunction::apply(student, problem);
}

}  // namespace qat::train
