#include "qat/train/objective.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>

#include "qat/core/error.hpp"
#include "train/answer.hpp"

namespace qat::train {
namespace {

constexpr const char* kName = "objective_loss";

struct Problem {
  at::Tensor student, targets;  ///< detached; targets: int64[B, T - 1]
  TeacherAnswer teacher;        ///< logits or top k
  RowLoss rule;
  bool wants_gradient = false;
};

/// One sequence's tensor, or nothing.
at::Tensor of_sequence(const at::Tensor& tensor, int64_t b) {
  return tensor.defined() ? tensor.detach().select(0, b) : tensor;
}

/// The loss in float64; fills `gradient`, [B, T, V] in the student's dtype, when defined.
at::Tensor solve(const Problem& problem, const at::Tensor& gradient) {
  const int64_t positions = problem.targets.size(1);
  const at::Tensor loss = at::zeros(problem.targets.sizes(), problem.student.options().dtype(at::kDouble));
  if (gradient.defined()) gradient.slice(1, positions).zero_();
  const TeacherAnswer& teacher = problem.teacher;
  for (int64_t b = 0; b < problem.targets.size(0); ++b) {
    const RowTeacher rows{of_sequence(teacher.logits, b), of_sequence(teacher.ids, b),
                          of_sequence(teacher.log_p, b)};
    problem.rule(problem.student.select(0, b).slice(0, 0, positions), rows.slice(0, positions),
                 problem.targets.select(0, b), loss.select(0, b),
                 gradient.defined() ? gradient.select(0, b).slice(0, 0, positions) : gradient);
  }
  return loss.sum();
}

class ObjectiveFunction : public torch::autograd::Function<ObjectiveFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& /*student*/,
                            const Problem& problem) {
    at::Tensor gradient;
    if (problem.wants_gradient) gradient = at::empty_like(problem.student, at::MemoryFormat::Contiguous);
    const at::Tensor loss = solve(problem, gradient);
    context->save_for_backward({gradient});
    return loss.to(problem.rule.compute);
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

}  // namespace

at::Tensor objective_loss(const at::Tensor& student, const TeacherAnswer& teacher, const at::Tensor& tokens,
                          const Objective& objective) {
  check_tokens(kName, tokens);
  check(student.defined() && student.dim() == 3 && student.is_floating_point() &&
            student.sizes().slice(0, 2) == tokens.sizes() && student.size(2) >= 1,
        kName, "student", "float logits [B, T, V] for tokens " + describe(tokens), student);
  check_answer(kName, teacher, tokens, student.size(2), objective);
  Problem problem{student.detach(), tokens.slice(1, 1).to(student.device()), teacher, {objective}};
  if (teacher.hidden.defined()) {
    const c10::NoGradGuard no_grad;
    problem.teacher = TeacherAnswer(teacher.head.logits(teacher.hidden));
  }
  problem.rule.positions = static_cast<double>(problem.targets.numel());
  if (student.scalar_type() == at::kDouble) problem.rule.compute = at::kDouble;
  problem.rule.objective =
      with_confidence(objective, problem.teacher, problem.targets.flatten(), problem.targets.size(1),
                      problem.targets.size(1), problem.rule.compute);
  problem.wants_gradient = student.requires_grad() && c10::GradMode::is_enabled();
  return ObjectiveFunction::apply(student, problem);
}

}  // namespace qat::train
