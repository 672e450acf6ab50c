#pragma once

// What training minimises, with its gradient in closed form. Legend: B sequences, T tokens, V vocabulary.

#include <ATen/core/Tensor.h>

namespace qat::train {

/// Weights of the loss terms; the loss is their sum. Both are means over predicted tokens, in nats.
struct Objective {
  double kl = 1.0;  ///< KL(teacher || student) at `temperature`, times temperature^2; needs a teacher
  double ce = 0.0;  ///< cross-entropy with the next token
  double temperature = 1.0;
};

/// The loss of one micro-batch as a scalar, float32 (float64 for float64 logits). With t the temperature,
/// N = B (T - 1) predicted positions, p and q the softmax of teacher and student logits z:
///     kl * t^2/N * sum_v p(z_p/t) log(p(z_p/t) / q(z_q/t))  +  ce * 1/N * -log q(z_q)[next token]
///     dL/dz_q = kl * t/N * (q(z_q/t) - p(z_p/t))  +  ce * 1/N * (q(z_q) - onehot(next token))
/// student: float[B, T, V] of any width, its gradient in its dtype; the last position predicts nothing.
/// teacher: float[B, T, V], constant; may be undefined when `kl` is 0. tokens: int64[B, T], T >= 2.
/// The gradient is formed in the forward pass, block of rows by block of rows, so the peak beyond the logits
/// is one tensor of their size. Double backward raises UnsupportedError. ArgumentError for shapes and dtypes.
/// (Hinton et al. 2015, arXiv:1503.02531, for the temperature and its square.)
at::Tensor objective_loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& tokens,
                          const Objective& objective);

}  // namespace qat::train
