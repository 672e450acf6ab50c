#include "train/answer.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <sstream>
#include <vector>

#include "qat/core/error.hpp"

namespace qat::train {

std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "nothing";
  std::ostringstream text;
  text << c10::toString(tensor.scalar_type()) << tensor.sizes();
  return text.str();
}

void check(bool ok, const char* function, const char* subject, const std::string& expected,
           const at::Tensor& got) {
  if (ok) return;
  throw ArgumentError(std::string(function) + ": " + subject + ": expected " + expected + ", got " +
                      describe(got));
}

void check_tokens(const char* function, const at::Tensor& tokens) {
  check(tokens.defined() && tokens.dim() == 2 && tokens.scalar_type() == at::kLong && tokens.size(0) >= 1 &&
            tokens.size(1) >= 2,
        function, "tokens", "int64[B, T] with T >= 2", tokens);
}

void check_answer(const char* function, const TeacherAnswer& teacher, const at::Tensor& tokens,
                  int64_t vocabulary, const Objective& objective) {
  if (!objective.needs_teacher()) return;
  const std::string size = std::to_string(vocabulary), of_tokens = " for tokens " + describe(tokens);
  const auto fits = [&](const at::Tensor& tensor, int64_t predicted) {
    return tensor.dim() == 3 && tensor.size(0) == tokens.size(0) && tensor.size(1) == predicted;
  };
  if (teacher.ids.defined()) {
    if (objective.needs_confidence()) {
      throw ArgumentError(
          std::string(function) +
          ": objective.cakld_beta: expected a number in [0, 1] with a cached teacher, whose k "
          "tokens need not hold the next one, got -1");
    }
    const bool ids = teacher.ids.scalar_type() == at::kLong && fits(teacher.ids, tokens.size(1) - 1) &&
                     teacher.ids.size(2) >= 1 && teacher.ids.size(2) < vocabulary;
    check(ids, function, "teacher.ids", "int64[B, T - 1, k], 1 <= k < " + size + of_tokens, teacher.ids);
    const bool log_p = teacher.log_p.defined() && teacher.log_p.is_floating_point() &&
                       fits(teacher.log_p, tokens.size(1) - 1) &&
                       teacher.log_p.size(2) == teacher.ids.size(2) + 1;
    check(log_p, function, "teacher.log_p", "float[B, T - 1, k + 1]" + of_tokens, teacher.log_p);
  } else if (teacher.hidden.defined()) {
    const bool hidden = teacher.hidden.is_floating_point() && fits(teacher.hidden, tokens.size(1));
    check(hidden, function, "teacher.hidden", "float[B, T, h]" + of_tokens, teacher.hidden);
    const at::Tensor& weight = teacher.head.weight;
    check(weight.defined() && weight.dim() == 2 && weight.size(0) == vocabulary &&
              weight.size(1) == teacher.hidden.size(2),
          function, "teacher.head.weight", "[" + size + ", " + std::to_string(teacher.hidden.size(2)) + "]",
          weight);
  } else {
    const at::Tensor& logits = teacher.logits;
    check(logits.defined() && logits.is_floating_point() && fits(logits, tokens.size(1)) &&
              logits.size(2) == vocabulary,
          function, "teacher", "float logits [B, T, " + size + "]" + of_tokens, logits);
  }
}

at::Tensor predicted_rows(const at::Tensor& tensor, int64_t first, int64_t last, int64_t positions) {
  std::vector<at::Tensor> parts;
  for (int64_t row = first; row < last;) {
    const int64_t sequence = row / positions, at = row % positions;
    const int64_t end = std::min(positions, at + last - row);
    parts.push_back(tensor.select(0, sequence).slice(0, at, end));
    row += end - at;
  }
  return parts.size() == 1 ? parts.front() : at::cat(parts);
}

namespace {

/// What forward multiplies with: while rounding is blended in, a mix of the latent and of what ships.
at::Tensor forward_weight(const Head& head, at::ScalarType dtype) {
  const double blend = rounded_share(head);
  if (blend == 1) return head.shipped_weight(dtype);
  const at::Tensor latent = head.weight.detach().to(dtype);
  return blend == 0 ? latent : at::lerp(latent, head.shipped_weight(dtype), blend);
}

}  // namespace

double rounded_share(const Head& head) {
  return head.quantizer && head.quantizer->enabled() ? head.quantizer->blend() : 1;
}

HeadRounding rounding_of(const Head& head) {
  if (!head.quantizer || !head.quantizer->enabled() || rounded_share(head) != 1) return {};
  const auto used = [](const std::shared_ptr<ActivationQuantizer>& rounding) {
    return rounding && rounding->enabled() ? rounding : nullptr;
  };
  return {used(head.quantizer->input()), used(head.quantizer->output())};
}

bool blends_products(const Head& head) {
  const double share = rounded_share(head);
  return share != 0 && share != 1 && (head.quantizer->input() || head.quantizer->output());
}

PieceLogits::PieceLogits(const Head& head, at::ScalarType dtype)
    : weight_(forward_weight(head, dtype)),
      bias_(head.bias.defined() ? head.bias.detach().to(dtype) : at::Tensor()),
      rounding_(rounding_of(head).output),
      softcap_(head.softcap) {}

at::Tensor PieceLogits::products(const at::Tensor& rows) {
  logits_.reset();
  if (!buffer_.defined() || buffer_.size(0) < rows.size(0)) {
    buffer_.reset();  // before the larger one is allocated
    slope_.reset();
    buffer_ = at::empty({rows.size(0), weight_.size(0)}, weight_.options());
  }
  products_ = buffer_.slice(0, 0, rows.size(0));
  if (bias_.defined()) {
    at::addmm_out(products_, bias_, rows, weight_.t());
  } else {
    at::mm_out(products_, rows, weight_.t());
  }
  return products_;
}

at::Tensor PieceLogits::of(const at::Tensor& rows) {
  logits_ = products(rows);
  // Apart from the products, which say where a gradient passes.
  if (rounding_) logits_ = rounding_->values(logits_);
  if (softcap_ != 0.0) logits_.div_(softcap_).tanh_().mul_(softcap_);
  return logits_;
}

at::Tensor PieceLogits::cap_slope() {
  if (softcap_ == 0.0) return {};
  // c * tanh(z / c) has the slope 1 - tanh^2(z / c).
  if (!slope_.defined()) slope_ = at::empty_like(buffer_);
  at::Tensor slope = slope_.slice(0, 0, logits_.size(0));
  at::div_out(slope, logits_, at::scalar_tensor(softcap_, logits_.options()));
  return slope.square_().neg_().add_(1.0);
}

ActivationGradients PieceLogits::round_backward(const at::Tensor& gradient) const {
  return rounding_ ? rounding_->backward(gradient, products_) : ActivationGradients{gradient, {}};
}

TeacherRows::TeacherRows(const TeacherAnswer& answer, int64_t positions)
    : answer_(answer), positions_(positions) {
  if (!answer.hidden.defined()) return;
  at::Tensor hidden = answer.hidden.detach();
  if (blends_products(answer.head)) {
    const at::NoGradGuard no_grad;
    answer_ = TeacherAnswer(answer.head.logits(hidden));
    return;
  }
  if (const auto& rounding = rounding_of(answer.head).input) hidden = rounding->values(hidden);
  logits_ = PieceLogits(answer.head, hidden.scalar_type());
  hidden_ = predicted_rows(hidden, 0, hidden.size(0) * positions, positions);
}

RowTeacher TeacherRows::rows(int64_t first, int64_t last) {
  if (hidden_.defined()) return {logits_.of(hidden_.slice(0, first, last)), {}, {}};
  const auto take = [&](const at::Tensor& tensor) {
    return tensor.defined() ? predicted_rows(tensor.detach(), first, last, positions_) : tensor;
  };
  return {take(answer_.logits), take(answer_.ids), take(answer_.log_p)};
}

Objective with_confidence(const Objective& objective, const TeacherAnswer& answer, const at::Tensor& targets,
                          int64_t positions, int64_t height, at::ScalarType compute) {
  if (!objective.needs_confidence()) return objective;
  const int64_t total = targets.size(0);
  TeacherRows teacher(answer, positions);
  double sum = 0;
  for (int64_t first = 0; first < total; first += height) {
    const int64_t last = std::min(first + height, total);
    sum += confidence(teacher.rows(first, last).logits, targets.slice(0, first, last), compute);
  }
  Objective result = objective;
  // A mean of rounded probabilities may exceed 1 by a little.
  result.cakld_beta = std::min(sum / static_cast<double>(total), 1.0);
  return result;
}

int64_t piece_height(int64_t chunk, int64_t rows, int64_t vocabulary) {
  // Products with fewer than 128 rows wait for the table's bytes; more than 2^24 logits gain nothing.
  constexpr int64_t kPieceLogits = int64_t{1} << 24, kLeast = 128, kMultiple = 32;
  if (chunk > 0) return chunk;
  const int64_t most = std::max(kPieceLogits / vocabulary, kLeast);
  const int64_t pieces = (rows + most - 1) / most, height = (rows + pieces - 1) / pieces;
  return (height + kMultiple - 1) / kMultiple * kMultiple;
}

at::Tensor in_compute_dtype(const at::Tensor& tensor) {
  const at::DeviceType device = tensor.device().type();
  if (!at::autocast::is_autocast_enabled(device) || tensor.scalar_type() == at::kDouble) return tensor;
  return tensor.to(at::autocast::get_autocast_dtype(device));
}

}  // namespace qat::train
