#pragma once

// A teacher's answer, and the arguments of a loss, as rows.

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "qat/train/objective.hpp"
#include "qat/train/pieces.hpp"
#include "train/row_loss.hpp"

namespace qat::train {

/// Throws ArgumentError "function: subject: expected ..., got Float[2, 3]" unless `ok`.
void check(bool ok, const char* function, const char* subject, const std::string& expected,
           const at::Tensor& got);

/// "Float[2, 3]", or "nothing".
std::string describe(const at::Tensor& tensor);

/// tokens must be int64[B, T], T >= 2.
void check_tokens(const char* function, const at::Tensor& tokens);

/// The answer must have the form that `objective` needs, for tokens int64[B, T] and a vocabulary of V.
void check_answer(const char* function, const TeacherAnswer& teacher, const at::Tensor& tokens,
                  int64_t vocabulary, const Objective& objective);

/// Predicted positions first ... last - 1, counted over all sequences, of [B, T or more, ...] -> [n, ...]: a
/// view when they lie in one sequence of a dense tensor. positions: T - 1.
at::Tensor predicted_rows(const at::Tensor& tensor, int64_t first, int64_t last, int64_t positions);

/// The quantizer's blend; 1 without one, and when it is disabled.
double rounded_share(const Head& head);

/// What rounds the rows before the product with the head's weight, and the products; null for nothing.
struct HeadRounding {
  std::shared_ptr<ActivationQuantizer> input, output;
};
HeadRounding rounding_of(const Head& head);

/// Whether one product would not do: those of rounded and of plain rows are mixed, or so are they themselves.
bool blends_products(const Head& head);

/// The products of `head` with a piece of rows at a time, in a buffer that the next piece reuses. Scales are
/// those of the time of a call; nothing calibrates.
class PieceLogits {
 public:
  PieceLogits() = default;
  /// W_hat, blended as the quantizer says, and bias, in `dtype`.
  PieceLogits(const Head& head, at::ScalarType dtype);

  /// rows: dtype[n, h], rounded -> products dtype[n, V] and the bias, not rounded, valid until the next call.
  at::Tensor products(const at::Tensor& rows);
  /// The same, rounded and capped as the head says.
  at::Tensor of(const at::Tensor& rows);
  /// d(capped)/d(rounded) of what `of` gave last, as long as its values are in place; undefined without a
  /// cap.
  at::Tensor cap_slope();
  /// The gradients of the products and of their scale, from that of the rounded products that `of` made last.
  ActivationGradients round_backward(const at::Tensor& gradient) const;
  const at::Tensor& weight() const noexcept { return weight_; }

 private:
  at::Tensor weight_, bias_, buffer_, products_, logits_, slope_;
  std::shared_ptr<ActivationQuantizer> rounding_;
  double softcap_ = 0.0;
};

/// Takes the teacher's side of one piece of rows after another.
class TeacherRows {
 public:
  /// positions: T - 1.
  TeacherRows(const TeacherAnswer& answer, int64_t positions);
  /// Of predicted positions first ... last - 1; logits are valid until the next call.
  RowTeacher rows(int64_t first, int64_t last);

 private:
  TeacherAnswer answer_;
  int64_t positions_;
  PieceLogits logits_;
  at::Tensor hidden_;
};

/// `objective` with its cakld_beta filled in from the answer, if it asks for that. targets: int64[N], the
/// next tokens; height: of the pieces in which a head's logits are made.
Objective with_confidence(const Objective& objective, const TeacherAnswer& answer, const at::Tensor& targets,
                          int64_t positions, int64_t height, at::ScalarType compute);

/// `tensor` in autocast's dtype when autocast is on, as a matrix product would take it.
at::Tensor in_compute_dtype(const at::Tensor& tensor);

}  // namespace qat::train
