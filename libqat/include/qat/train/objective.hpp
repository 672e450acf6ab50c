#pragma once

// What training minimises, with its gradient in closed form. Legend: B sequences, T tokens, V vocabulary,
// h hidden width, k outcomes that a cached teacher tells apart.

#include <ATen/core/Tensor.h>

#include <utility>

#include "qat/quantizer/head.hpp"

namespace qat::train {

/// Weights of the loss terms; the loss is their sum. All are means over predicted tokens, in nats. With p the
/// teacher's and q the student's distribution at `temperature`, a divergence is multiplied with
/// temperature^2.
struct Objective {
  double kl = 1.0;  ///< KL(p || q)
  double ce = 0.0;  ///< cross-entropy with the next token, at temperature 1
  double temperature = 1.0;
  double reverse_kl = 0.0;  ///< KL(q || p)
  /// a KL(p || m) + (1 - a) KL(q || m), m = a p + (1 - a) q. (Agarwal et al. 2023, arXiv:2306.13649)
  double jsd = 0.0;
  double jsd_alpha = 0.5;  ///< a, between 0 and 1
  /// b KL(q || p) + (1 - b) KL(p || q). (CAKLD; Du et al. 2024, arXiv:2402.10631)
  double cakld = 0.0;
  /// b, in [0, 1]; -1 takes the mean probability that the teacher gives, at temperature 1, to the next tokens
  /// of the micro-batch: it imitates where the teacher is unsure, and seeks its modes where it is sure.
  double cakld_beta = -1.0;

  /// Whether a term compares with a teacher.
  bool needs_teacher() const noexcept { return kl > 0 || reverse_kl > 0 || jsd > 0 || cakld > 0; }
  /// Whether b has to be taken from the teacher's answer.
  bool needs_confidence() const noexcept { return cakld > 0 && cakld_beta < 0; }
  /// The same with all weights multiplied.
  Objective times(double factor) const noexcept;
};

/// A teacher's answer to one micro-batch, constant, in one of three forms; none when the objective
/// needs no teacher.
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
/// N = B (T - 1) predicted positions, p and q the softmax of teacher and student logits z / t:
///     kl * t^2/N * sum_v p log(p/q)  +  ce * 1/N * -log softmax(z)[next token]  +  ...
///     dL/dz = kl * t/N * (q - p)  +  ce * 1/N * (softmax(z) - onehot(next token))
///           + reverse_kl * t/N * q (log(q/p) - KL(q||p))  +  jsd * (1 - a) t/N * q (log(q/m) - KL(q||m))
/// and CAKLD is a mix of the two KL, b a constant. 0 log 0 is 0; where p is 0 and q is not, reverse_kl is
/// infinite.
/// With top k outcomes and the rest r, the sums run over k + 1 outcomes, where q_r = sum of q over all other
/// tokens; the gradient at such a token v is q_v / q_r times that of the rest. By the data-processing
/// inequality this loss is at most the full one. ArgumentError when b is wanted from such an answer, which
/// need not know the next token.
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
/// pieces of logits (one without a teacher's; three more where the head's outputs are rounded), and the
/// gradients. hidden: float[B, T, h] (autocast's dtype when autocast is on), its gradient in its dtype.
/// head.weight: its gradient in its dtype (accumulated in float32 at least), passed to the latent and to
/// learned scales as `Quantizer` does; head.bias likewise. Gradients are formed only for what requires them.
/// Rounded outputs calibrate their scale with all B T positions, in pieces too, before the loss; only while a
/// blend mixes rounded activations with plain ones do all logits exist. Equal to
/// objective_loss(head.logits(hidden), ...) up to the rounding of matrix products of other heights.
at::Tensor head_loss(const at::Tensor& hidden, const Head& head, const TeacherAnswer& teacher,
                     const at::Tensor& tokens, const Objective& objective, int64_t chunk = 0);

}  // namespace qat::train
