#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <string>

#include "qat/core/error.hpp"
#include "qat/train/objective.hpp"
#include "train/answer.hpp"

namespace qat::train {
namespace {

constexpr const char* kName = "head_loss";
using OptionalTensor = std::optional<at::Tensor>;

struct Problem {
  at::Tensor hidden, targets;  ///< [N, h] of the predicted positions; int64[N]; detached
  at::Tensor observed;         ///< [B T, h] of all positions, when the products calibrate their scale
  Head head;
  TeacherAnswer teacher;
  RowLoss rule;
  int64_t sequences = 0;  ///< B
  int64_t height = 0;     ///< of a piece
  bool wants_hidden = false, wants_weight = false, wants_bias = false;
  bool wants_latent = false;  ///< of the two that need `weight`: the latent; the other are learned scales
  bool wants_step = false;    ///< of the scale of rounded products

  bool wants_any() const noexcept { return wants_hidden || wants_weight || wants_bias || wants_step; }

  int64_t positions() const noexcept { return targets.size(0) / sequences; }  ///< T - 1
};

struct Gradients {
  at::Tensor hidden, weight, bias, step;
};

/// Gradients to fill, of what wants one: `weight` is written by the first piece, the others start at zero.
/// Sums over pieces are float32 at least.
Gradients blank_gradients(const Problem& problem) {
  Gradients blank;
  const auto sums = problem.hidden.options().dtype(problem.rule.compute);
  if (problem.wants_hidden) {
    blank.hidden = at::zeros({problem.sequences, problem.positions() + 1, problem.hidden.size(1)},
                             problem.hidden.options());
  }
  if (problem.wants_weight) blank.weight = at::empty(problem.head.weight.sizes(), sums);
  if (problem.wants_bias) blank.bias = at::zeros(problem.head.bias.sizes(), sums);
  if (problem.wants_step) blank.step = at::zeros_like(problem.head.quantizer->output()->scale());
  return blank;
}

/// sum (+)= gradient^T @ rows. Products of a lower precision are widened a few rows of the table at a time,
/// while they are in a core's cache: a table has more bytes than a piece of logits.
void add_weight(const at::Tensor& gradient, const at::Tensor& rows, const at::Tensor& sum, bool first) {
  constexpr int64_t kTableRows = 4096;
  if (sum.scalar_type() == rows.scalar_type()) {
    at::Tensor(sum).addmm_(gradient.t(), rows, first ? 0 : 1);
    return;
  }
  for (int64_t row = 0; row < sum.size(0); row += kTableRows) {
    const at::Tensor part = at::mm(gradient.slice(1, row, row + kTableRows).t(), rows);
    const at::Tensor place = sum.slice(0, row, row + kTableRows);
    if (first) {
      place.copy_(part);
    } else {
      place.add_(part.to(sum.scalar_type()));
    }
  }
}

/// Adds what a piece gives. gradient: [n, V] in hidden's dtype, of the loss by the logits of these rows.
void add_piece(const Problem& problem, const at::Tensor& rows, const at::Tensor& gradient,
               const at::Tensor& weight, int64_t first, const Gradients& sums) {
  if (sums.hidden.defined()) {
    const at::Tensor back = at::mm(gradient, weight);
    const int64_t positions = problem.positions();
    for (int64_t row = 0; row < rows.size(0);) {  // the last position of a sequence has no row
      const int64_t sequence = (first + row) / positions, at = (first + row) % positions;
      const int64_t count = std::min(positions - at, rows.size(0) - row);
      sums.hidden.select(0, sequence).slice(0, at, at + count).copy_(back.slice(0, row, row + count));
      row += count;
    }
  }
  if (sums.weight.defined()) add_weight(gradient, rows, sums.weight, first == 0);
  if (sums.bias.defined()) sums.bias.add_(gradient.sum(0, false, sums.bias.scalar_type()));
}

/// As a pass that holds all products calibrates. It is the largest of all that sets the scale, so a loss can
/// round the first only when the last is known: these passes multiply twice.
void observe(const Problem& problem, PieceLogits& student) {
  at::Tensor largest;
  for (const at::Tensor& rows : problem.observed.split(problem.height)) {
    const at::Tensor found = student.products(rows).abs_().max();
    largest = largest.defined() ? at::maximum(largest, found) : found;
  }
  problem.head.quantizer->output()->observe(largest);
}

/// The loss in float64, and the gradients.
at::Tensor solve(const Problem& problem, const Gradients& sums) {
  const int64_t total = problem.targets.size(0);
  const at::Tensor loss = at::zeros({total}, problem.hidden.options().dtype(at::kDouble));
  PieceLogits student(problem.head, problem.hidden.scalar_type());
  if (problem.observed.defined()) observe(problem, student);
  TeacherRows teacher(problem.teacher, problem.positions());
  for (int64_t first = 0; first < total; first += problem.height) {
    const int64_t last = std::min(first + problem.height, total);
    const at::Tensor rows = problem.hidden.slice(0, first, last);
    const at::Tensor logits = student.of(rows);
    const bool any = problem.wants_any();
    const at::Tensor slope =
        any ? student.cap_slope() : at::Tensor();  // before a gradient replaces the logits
    problem.rule(logits, teacher.rows(first, last), problem.targets.slice(0, first, last),
                 loss.slice(0, first, last), any ? logits : at::Tensor());
    if (!any) continue;
    if (slope.defined()) logits.mul_(slope);
    const ActivationGradients passed = student.round_backward(logits);
    add_piece(problem, rows, passed.input, student.weight(), first, sums);
    if (sums.step.defined()) sums.step.add_(passed.scale);
  }
  return loss.sum();
}

/// From the gradient of what forward multiplied with.
WeightGradients pass_on(const Head& head, const at::Tensor& gradient) {
  const double share = rounded_share(head);
  if (!head.quantizer || share == 0) return {gradient, {}};
  WeightGradients passed = head.quantizer->weight_backward(gradient, head.weight.detach());
  if (share == 1) return passed;
  passed.latent = at::lerp(gradient, passed.latent, share);
  if (passed.scales.defined()) passed.scales.mul_(share);
  return passed;
}

class HeadLoss : public torch::autograd::Function<HeadLoss> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& /*hidden*/,
                            const at::Tensor& /*weight*/, const OptionalTensor& /*bias*/,
                            const OptionalTensor& /*scales*/, const OptionalTensor& /*step*/,
                            const Problem& problem) {
    // Products of the compute dtype must not be cast once more.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Gradients sums = blank_gradients(problem);
    const at::Tensor loss = solve(problem, sums);
    const Head& head = problem.head;
    at::Tensor scales;
    if (sums.weight.defined()) {
      WeightGradients passed = pass_on(head, sums.weight);
      sums.weight = std::move(passed.latent);
      scales = std::move(passed.scales);
      sums.weight = problem.wants_latent ? sums.weight.to(head.weight.scalar_type()) : at::Tensor();
    }
    if (sums.bias.defined()) sums.bias = sums.bias.to(head.bias.scalar_type());
    context->save_for_backward({sums.hidden, sums.weight, sums.bias, scales, sums.step});
    return loss.to(problem.rule.compute);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    if (c10::GradMode::is_enabled()) {
      throw UnsupportedError("head_loss: backward: expected a first derivative, got a double backward");
    }
    torch::autograd::variable_list gradients = context->get_saved_variables();
    const double scale = upstream[0].item<double>();
    for (at::Tensor& gradient : gradients) {
      if (gradient.defined() && scale != 1) gradient = gradient * scale;
    }
    gradients.emplace_back();
    return gradients;
  }
};

void check_arguments(const at::Tensor& hidden, const Head& head, const TeacherAnswer& teacher,
                     const at::Tensor& tokens, const Objective& objective) {
  check_tokens(kName, tokens);
  check(hidden.defined() && hidden.dim() == 3 && hidden.is_floating_point() &&
            hidden.sizes().slice(0, 2) == tokens.sizes(),
        kName, "hidden", "float[B, T, h] for tokens " + describe(tokens), hidden);
  const at::Tensor& weight = head.weight;
  check(weight.defined() && weight.dim() == 2 && weight.is_floating_point() && weight.size(0) >= 1 &&
            weight.size(1) == hidden.size(2),
        kName, "head.weight", "float[V, " + std::to_string(hidden.size(2)) + "]", weight);
  check(!head.bias.defined() || (head.bias.dim() == 1 && head.bias.size(0) == weight.size(0)), kName,
        "head.bias", "[" + std::to_string(weight.size(0)) + "]", head.bias);
  check_answer(kName, teacher, tokens, weight.size(0), objective);
}

OptionalTensor learned_scales(const Head& head) {
  if (!head.quantizer || !head.quantizer->enabled() || !head.quantizer->scales().defined()) {
    return std::nullopt;
  }
  return head.quantizer->scales();
}

/// Of the products, unless this pass finds it.
OptionalTensor learned_step(const HeadRounding& rounding, const Problem& problem) {
  const bool trains = rounding.output && !problem.observed.defined() && rounding.output->has_scale() &&
                      rounding.output->scale().requires_grad();
  return trains ? OptionalTensor(rounding.output->scale()) : std::nullopt;
}

}  // namespace

at::Tensor head_loss(const at::Tensor& hidden, const Head& head, const TeacherAnswer& teacher,
                     const at::Tensor& tokens, const Objective& objective, int64_t chunk) {
  check_arguments(hidden, head, teacher, tokens, objective);
  if (chunk < 0) {
    throw ArgumentError("head_loss: chunk: expected at least 0 positions, got " + std::to_string(chunk));
  }
  at::Tensor input = in_compute_dtype(hidden);
  if (blends_products(head)) return objective_loss(head.logits(input), teacher, tokens, objective);
  const HeadRounding rounding = rounding_of(head);
  if (rounding.input) input = (*rounding.input)(input);
  const at::Tensor dense = input.detach();
  const int64_t sequences = tokens.size(0), positions = tokens.size(1) - 1;
  Problem problem{predicted_rows(dense, 0, sequences * positions, positions).contiguous(),
                  tokens.slice(1, 1).to(hidden.device()).flatten(),
                  rounding.output && rounding.output->calibrates() ? dense.flatten(0, 1) : at::Tensor(),
                  head,
                  teacher,
                  {objective},
                  sequences,
                  piece_height(chunk, sequences * positions, head.weight.size(0))};
  if (teacher.hidden.defined()) problem.teacher.hidden = in_compute_dtype(teacher.hidden.detach());
  problem.rule.positions = static_cast<double>(sequences * positions);
  if (input.scalar_type() == at::kDouble) problem.rule.compute = at::kDouble;
  problem.rule.objective = with_confidence(objective, problem.teacher, problem.targets, positions,
                                           problem.height, problem.rule.compute);
  const bool on = c10::GradMode::is_enabled();
  problem.wants_hidden = on && input.requires_grad();  // or what rounded it
  problem.wants_latent = on && head.weight.requires_grad();
  const OptionalTensor scales = learned_scales(head);
  problem.wants_weight = problem.wants_latent || (on && scales && scales->requires_grad());
  problem.wants_bias = on && head.bias.defined() && head.bias.requires_grad();
  const OptionalTensor step = learned_step(rounding, problem);
  problem.wants_step = on && step;
  return HeadLoss::apply(input, head.weight, head.bias.defined() ? OptionalTensor(head.bias) : std::nullopt,
                         scales, step, problem);
}

}  // namespace qat::train
