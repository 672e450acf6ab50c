#pragma once

// Multiple choice by log-likelihood: a model chooses the answer whose tokens it finds most probable after the
// question. Only token ids here; libqat.compare_choices does the tokenizing.

#include <functional>
#include <vector>

#include "qat/eval/eval.hpp"

namespace qat::eval {

/// A causal language model in two halves, so that logits exist only where they are scored. Called without
/// gradients. models::Decoder has both halves.
struct SplitModel {
  std::function<at::Tensor(const at::Tensor& tokens)> hidden;  ///< int64[B, T] -> [B, T, h]
  std::function<at::Tensor(const at::Tensor& hidden)> head;    ///< [N, h] -> float logits [N, V]

  /// A model that only gives all its logits: the first half computes them, the second passes them on.
  static SplitModel whole(LogitsFunction logits);
};

/// Tokens [0, context) are given, the others are scored.
struct Continuation {
  std::vector<int64_t> tokens;  ///< more than `context`
  int64_t context = 1;          ///< 1 or more
};

/// How questions are batched.
struct ChoiceOptions {
  /// Longest input of the model; longer contexts lose their beginning.
  int64_t max_length = 2048;
  /// B * T of a call at most, padding included; a single long row may exceed it.
  int64_t batch_tokens = 1024;
  /// Called after each batch with scored continuations done and in all.
  std::function<void(int64_t done, int64_t total)> progress;
};

/// log p(scored tokens | context) of each continuation, in nats. Continuations with the same input (all
/// tokens but the last) share a row of a batch; rows are padded at their end with token 0, which a causal
/// model does not see. Log-probabilities in float32, sums in double. ArgumentError for a context or
/// continuation that is empty, negative ids, a continuation longer than `max_length`, ids beyond the
/// vocabulary, and for outputs of another shape.
std::vector<double> log_likelihoods(const SplitModel& model, const std::vector<Continuation>& continuations,
                                    const ChoiceOptions& options = {});

/// What may be chosen.
struct Question {
  std::vector<Continuation> choices;  ///< 1 or more
  std::vector<int64_t> bytes;         ///< UTF-8 length of each choice's text, 1 or more
  int64_t answer = 0;                 ///< index of the right choice
};

/// The choices of one model. Ties go to the first choice; NaN is never chosen before a number.
struct ChoiceScore {
  std::vector<std::vector<double>> log_likelihoods;  ///< [question][choice], nats
  std::vector<int64_t> chosen;                       ///< per question: index of the greatest log-likelihood
  std::vector<int64_t> chosen_per_byte;              ///< the same after division by the choice's bytes
  double accuracy = 0;                               ///< share of questions whose `chosen` is the answer
  double accuracy_norm = 0;                          ///< the same for `chosen_per_byte`
};

/// Scores every choice of every question. ArgumentError for no questions, for answers and bytes out of range,
/// and as `log_likelihoods`.
ChoiceScore score_choices(const SplitModel& model, const std::vector<Question>& questions,
                          const ChoiceOptions& options = {});

}  // namespace qat::eval
