#pragma once

// What training minimises, with its gradient in closed form. Legend: B sequences, T tokens, V vocabulary,
// h hidden width, k outcomes that a cached teacher tells apart.

#include <ATen/core/Tensor.h>

#include <utility>

#include "qat/quantizer/head.hpp"

namespace qat::train {

/// Weights of the loss terms; the loss is their sum. Both are means over predicted tokens, in nats.
struct Objective {
  double kl = 1.0;  ///< KL(teacher || student) at `temperature`, times temperature^2; needs a teacher
  double ce = 0.0;  ///< cross-entropy with the next token
  double temperature = 1.0;
};

/// A teacher's answer to one micro-batch, constant, in one of three forms; none when objective.kl is 0.
struct TeacherAnswer {
  TeacherAnswer() = default;
  /// float[B, T, V] of any width.
  TeacherAnswer(at::Tensor full_logits) : logits(std::move(full_logits)) {}
  /// float[B, T, h] and the head that makes logits of it, piece by piece.
  TeacherAnswer(at::Tensor hidden_states, Head output_head)
      : hidden(std::move(hidden_states)), head(std::move(output_head)) {}
  /// int64[B, T - 1, k], ascending in each row, and float32[B, T - 1, k + 1]: the log-probabilities of these
  /// tokens and, last, of all others together, at objective.temperature. See TeacherCache.
  TeacherAnswer(at::Tensor top_ids, at::Tensor top_log_p)
      : ids(std::move(top_ids)), log_p(std::move(top_log_p)) {}

  at::Tensor logits;
  at::Tensor hidden;
  Head head;
  at::Tensor ids, log_p;
};

/// The loss of one micro-batch as a scalar, float32 (float64 for float64 logits). With t the temperature,
/// N = B (T - 1) predicted positions, p and q the softmax of teacher and student logits z:
///     kl * t^2/N * sum_v p(z_p/t) log(p(z_p/t) / q(z_q/t))  +  ce * 1/N * -log q(z_q)[next token]
///     dL/dz_q = kl * t/N * (q(z_q/t) - p(z_p/t))  +  ce * 1/N * (q(z_q) - onehot(next token))
/// With top k outcomes and the rest r, the sum runs over k + 1 outcomes, where q_r = sum of q over all other
/// tokens; the gradient at such a token v is kl * t/N * q_v (1 - p_r/q_r). By the log-sum inequality this
/// loss is at most the full one.
/// student: float[B, T, V] of any width, its gradient in its dtype; the last position predicts nothing.
/// tokens: int64[B, T], T >= 2.
/// The gradient is formed in the forward pass, block of rows by block of rows, so the peak beyond the logits
/// is one tensor of their size. Double backward raises UnsupportedError. ArgumentError for shapes and dtypes.
/// (Hinton et al. 2015, arXiv:1503.02531, for the temperature and its square.)
at::Tensor objective_loss(const at::Tensor& student, const TeacherAnswer& teacher, const at::Tensor& tokens,
                          const Objective& objective);

/// The same loss from the student's hidden states; logits [N, V] never exist. They are made for `chunk`
/// positions at a time (0: equal pieces of at most 2^24 logits, or 128 rows), turned into their gradient in
/// place, and multiplied back; W_hat is formed once, in hidden's dtype. Peak beyond the arguments: W_hat, two
/// pieces of logits (one without a teacher's), and the gradients. hidden: float[B, T, h] (autocast's dtype
/// when autocast is on), its gradient in its dtype. head.weight: its gradient in its dtype (accumulated in
/// float32 at least), passed to the latent as `Quantizer` does; head.bias likewise. Gradients are formed only
/// for what requires them. Equal to objective_loss(head.logits(hidden), ...) up to the rounding of matrix
/// products of other heights.
at::Tensor head_loss(const at::Tensor& hidden, const Head& head, const TeacherAnswer& teacher,
                     const at::Tensor& tokens, const Objective& objective, int64_t chunk = 0);

}  // namespace qat::train
