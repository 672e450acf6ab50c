#include "qat/train/cache_check.hpp"

#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "qat/train/compute.hpp"

namespace qat::train {
namespace {

/// A student's forward pass, from which losses can be taken several times.
struct Start {
  at::Tensor value;  ///< hidden states or logits; asks for a gradient
  Head head;         ///< constant; empty for logits

  at::Tensor loss(const TeacherAnswer& answer, const at::Tensor& tokens, const Options& options) const {
    const Objective divergence{1, 0, options.objective.temperature};
    if (!head.weight.defined()) return objective_loss(value, answer, tokens, divergence);
    return head_loss(value, head, answer, tokens, divergence, options.loss_chunk);
  }
};

Start begin(PreparedModel& model, const LanguageModel& student, const at::Tensor& tokens) {
  const c10::NoGradGuard no_grad;
  const auto quantized = model.quantized();
  if (!student.in_halves()) return {student.logits(tokens).detach().requires_grad_(), {}};
  Start start{student.hidden(tokens).detach().requires_grad_(), student.head()};
  start.head.weight = start.head.weight.detach();
  if (start.head.bias.defined()) start.head.bias = start.head.bias.detach();
  return start;
}

TeacherAnswer ask(const LanguageModel& teacher, const at::Tensor& tokens) {
  const c10::NoGradGuard no_grad;
  if (teacher.in_halves()) return {teacher.hidden(tokens), teacher.head()};
  return teacher.logits(tokens);
}

double product(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) * b.to(at::kDouble)).sum().item<double>();
}

}  // namespace

CacheCheck check_teacher_cache(PreparedModel& model, const LanguageModel& student,
                               const LanguageModel& teacher, const TeacherCache& cache, const TokenData& data,
                               const Options& options, int64_t batches) {
  CacheCheck result;
  double live_square = 0, cached_square = 0, mixed = 0;
  const ComputeScope scope(compute_dtype(options.compute_dtype));
  for (int64_t index = 0; index < batches; ++index) {
    const auto windows = data.windows(index, options.batch_size, options.sequence_length, options.seed);
    const at::Tensor tokens = data.read(windows, options.sequence_length);
    const Start start = begin(model, student, tokens);
    const auto measure = [&](const TeacherAnswer& answer, double& sum) {
      const at::Tensor loss = start.loss(answer, tokens, options);
      sum += loss.item<double>() / static_cast<double>(batches);
      return torch::autograd::grad({loss}, {start.value})[0];
    };
    const at::Tensor live = measure(ask(teacher, tokens), result.live);
    const at::Tensor cached = measure(cache.answer(windows), result.cached);
    live_square += product(live, live);
    cached_square += product(cached, cached);
    mixed += product(live, cached);
    result.tokens += tokens.size(0) * (tokens.size(1) - 1);
  }
  const double norms = std::sqrt(live_square * cached_square);
  if (norms > 0) result.cosine = mixed / norms;
  return result;
}

}  // namespace qat::train
