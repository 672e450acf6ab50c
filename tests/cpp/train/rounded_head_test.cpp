// A head that rounds what it reads and what it gives: the loss in pieces is that of all logits at once.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/train/objective.hpp"
#include "train/allocation_recorder.hpp"

namespace {

using qat::ActivationRule;
using qat::Head;
using qat::Quantizer;
using qat::train::head_loss;
using qat::train::Objective;
using qat::train::objective_loss;
using qat::train::TeacherAnswer;

constexpr int64_t kBatch = 3, kTokens = 5, kWidth = 32, kVocabulary = 19;
const Objective kObjective{.kl = 0.7, .ce = 0.3};

/// Hidden states in eighths and scales that are powers of two: products of any height are exact, so none of
/// them rounds to another code for the order of a sum.
struct Case {
  at::Tensor hidden, weight, tokens;
  TeacherAnswer teacher;
  std::shared_ptr<Quantizer> quantizer;

  explicit Case(qat::ActivationScales rule, const char* format = "int8_tensor_static") {
    at::manual_seed(5);
    hidden = (at::randn({kBatch, kTokens, kWidth}) * 8).round() / 8;
    hidden.select(1, kTokens - 1).mul_(2);  // the largest products predict nothing
    hidden.requires_grad_();
    weight = at::randn({kVocabulary, kWidth}).requires_grad_();
    tokens = at::randint(kVocabulary, {kBatch, kTokens}, at::TensorOptions(at::kLong));
    teacher = at::randn({kBatch, kTokens, kVocabulary});
    quantizer = std::make_shared<Quantizer>("head.weight", qat::Scheme{"int8_channel@pow2"},
                                            qat::Estimator{qat::EstimatorKind::kClippedSte});
    quantizer->add_activations({.input = "", .output = format}, rule, at::kCPU);
  }

  Head head(double softcap) const { return {weight, {}, quantizer, softcap}; }
  at::Tensor pieces(double softcap, int64_t chunk) const {
    return head_loss(hidden, head(softcap), teacher, tokens, kObjective, chunk);
  }
  at::Tensor whole(double softcap) const {
    return objective_loss(head(softcap).logits(hidden), teacher, tokens, kObjective);
  }
  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> all{hidden, weight};
    if (scale().requires_grad()) all.push_back(scale());
    return all;
  }
  const at::Tensor& scale() const { return quantizer->output()->scale(); }
  int64_t batches() const { return quantizer->output()->batches().item<int64_t>(); }
};

std::vector<at::Tensor> gradients(const at::Tensor& loss, const std::vector<at::Tensor>& leaves) {
  return torch::autograd::grad({loss}, leaves, {}, {}, /*create_graph=*/false, /*allow_unused=*/true);
}

void require_close(const at::Tensor& got, const at::Tensor& expected, double magnitude) {
  // float32 sums of at most 32 products, in another order.
  REQUIRE((got - expected).abs().max().item<double>() < 2e-6 * magnitude);
}

void require_close(const at::Tensor& got, const at::Tensor& expected) {
  require_close(got, expected, expected.abs().max().item<double>());
}

}  // namespace

TEST_CASE("a fixed scale: pieces have the loss of all logits, and no gradient where outputs are clipped") {
  for (const double softcap : {0.0, 6.0}) {
    const Case made({ActivationRule::kObserved, 0});
    made.quantizer->output()->set_scale(0.05);
    const Quantizer plain("head.weight", made.quantizer->scheme(), {});
    const at::Tensor products = plain.linear(made.hidden, made.weight, {}).slice(1, 0, -1).abs();
    const int64_t clipped = products.gt(127.5 * 0.05).sum().item<int64_t>();
    REQUIRE(clipped > products.numel() / 10);
    REQUIRE(clipped < products.numel() / 2);
    const at::Tensor expected = made.whole(softcap);
    const auto reference = gradients(expected, {made.hidden, made.weight});
    for (const int64_t chunk : {0, 1, 5}) {
      CAPTURE(softcap, chunk);
      const at::Tensor loss = made.pieces(softcap, chunk);
      REQUIRE(loss.equal(expected));
      const auto got = gradients(loss, {made.hidden, made.weight});
      for (std::size_t i = 0; i < 2; ++i) require_close(got[i], reference[i]);
      if (chunk == 0 && softcap == 0) REQUIRE(got[0].equal(reference[0]));
    }
    made.quantizer->output()->set_enabled(false);
    const auto open = gradients(made.pieces(softcap, 5), {made.hidden});
    require_close(open[0], gradients(made.whole(softcap), {made.hidden})[0]);
    REQUIRE_FALSE(open[0].equal(reference[0]));
  }
}

TEST_CASE("a learned scale gets its gradient from all pieces") {
  for (const double softcap : {0.0, 6.0}) {
    const Case made({ActivationRule::kLearned, 0});
    made.quantizer->output()->set_scale(0.05);
    const auto reference = gradients(made.whole(softcap), {made.hidden, made.scale()});
    for (const int64_t chunk : {0, 1, 5}) {
      const auto got = gradients(made.pieces(softcap, chunk), {made.hidden, made.scale()});
      for (std::size_t i = 0; i < 2; ++i) require_close(got[i], reference[i]);
    }
    REQUIRE(reference[1].abs().item<double>() > 1e-3);
    const Head constant{made.weight.detach(), {}, made.quantizer, softcap};
    const at::Tensor alone = head_loss(made.hidden.detach(), constant, made.teacher, made.tokens, kObjective);
    require_close(gradients(alone, {made.scale()})[0], reference[1]);
  }
}

TEST_CASE("passes in pieces calibrate as passes with all logits do") {
  for (const auto rule : {ActivationRule::kObserved, ActivationRule::kLearned}) {
    const Case made({rule, 2}), other({rule, 2});
    for (int64_t pass = 1; pass <= 3; ++pass) {
      const at::Tensor expected = other.whole(0), loss = made.pieces(0, 5);
      REQUIRE(loss.equal(expected));
      const auto reference = gradients(expected, other.leaves()), got = gradients(loss, made.leaves());
      for (std::size_t i = 0; i < 2; ++i) require_close(got[i], reference[i]);
      if (rule == ActivationRule::kLearned) REQUIRE(got[2].defined() == (pass == 3));
      REQUIRE(made.scale().equal(other.scale()));
      REQUIRE(made.scale().item<double>() > 0);
      REQUIRE(made.batches() == std::min<int64_t>(pass, 2));
      for (const Case* each : {&made, &other}) {  // a calibrated scale does not follow the third
        const at::NoGradGuard no_grad;
        each->hidden.mul_(2);
      }
    }
  }
}

TEST_CASE("calibration on request, without gradients, and of what no scale can hold") {
  const Case made({ActivationRule::kObserved, 0}), other({ActivationRule::kObserved, 0});
  const at::NoGradGuard no_grad;
  REQUIRE(made.pieces(0, 5).equal(other.whole(0)));
  REQUIRE(made.batches() == 0);
  for (const Case* each : {&made, &other}) each->quantizer->output()->set_calibrating(true);
  REQUIRE(made.pieces(0, 5).equal(other.whole(0)));
  REQUIRE(made.scale().equal(other.scale()));
  REQUIRE(made.batches() == 1);
  made.hidden.select(1, kTokens - 1).fill_(std::numeric_limits<float>::quiet_NaN());
  REQUIRE_THROWS_WITH(
      made.pieces(0, 5),
      "calibration: head.output_activation_scale: expected finite activations, got NaN or an infinity");
  REQUIRE(made.batches() == 1);
}

TEST_CASE("a scale of the inputs is learned, also when nothing before it is") {
  const Case made({ActivationRule::kLearned, 0});
  made.quantizer->add_activations({.input = "int8_tensor_static", .output = "int8_token"},
                                  {ActivationRule::kLearned, 0}, at::kCPU);
  made.quantizer->input()->set_scale(0.125);
  const at::Tensor& scale = made.quantizer->input()->scale();
  const at::Tensor hidden = made.hidden.detach() * 0.9, leaf = hidden.clone().requires_grad_();
  const Head head{made.weight.detach(), {}, made.quantizer};
  const at::Tensor loss = head_loss(hidden, head, made.teacher, made.tokens, kObjective, 5);
  const at::Tensor expected = objective_loss(head.logits(hidden), made.teacher, made.tokens, kObjective);
  REQUIRE(loss.equal(expected));
  // A sum over the inputs, of their gradients by what rounding moved them, of which most cancels.
  const at::Tensor whole = objective_loss(head.logits(leaf), made.teacher, made.tokens, kObjective);
  const double terms = gradients(whole, {leaf})[0].abs().sum().item<double>() / 2;
  require_close(gradients(loss, {scale})[0], gradients(expected, {scale})[0], terms);
}

TEST_CASE("in bfloat16 a single piece has the bits of all logits") {
  const Case made({ActivationRule::kObserved, 0});
  made.quantizer->output()->set_scale(0.05);
  const at::Tensor hidden = made.hidden.detach().to(at::kBFloat16).requires_grad_();
  const Head head = made.head(6);
  const at::Tensor loss = head_loss(hidden, head, made.teacher, made.tokens, kObjective);
  const at::Tensor expected = objective_loss(head.logits(hidden), made.teacher, made.tokens, kObjective);
  REQUIRE(loss.equal(expected));
  const at::Tensor got = gradients(loss, {hidden})[0], reference = gradients(expected, {hidden})[0];
  REQUIRE(got.scalar_type() == at::kBFloat16);
  // The slope of the cap is rounded to bfloat16's 8 bits at other places.
  REQUIRE((got - reference).abs().max().item<double>() < 0.02 * reference.abs().max().item<double>());
}

TEST_CASE("a teacher's head rounds, too, and is not calibrated by being asked") {
  const Objective unsure{.cakld = 1.0};  // asks twice
  const Case made({ActivationRule::kObserved, 4});
  made.quantizer->add_activations({.input = "int8_tensor_static", .output = "int8_tensor_static"},
                                  {ActivationRule::kObserved, 4}, at::kCPU);
  made.quantizer->input()->set_scale(0.5);
  made.quantizer->output()->set_scale(0.25);
  made.quantizer->output()->batches().zero_();
  const at::Tensor states = made.hidden.detach();
  const Head student{made.weight.roll(1, 0)};
  for (const double blend : {1.0, 0.5}) {
    made.quantizer->set_blend(blend);
    TeacherAnswer logits;
    {
      const at::NoGradGuard no_grad;
      logits = TeacherAnswer(made.head(6).logits(states));
    }
    const at::Tensor loss = head_loss(made.hidden, student, {states, made.head(6)}, made.tokens, unsure, 5);
    REQUIRE(loss.item<double>() ==
            Approx(head_loss(made.hidden, student, logits, made.tokens, unsure, 5).item<double>())
                .epsilon(1e-6));  // float32
    REQUIRE(made.batches() == 0);
  }
}

TEST_CASE("while rounding is blended in, activations of both kinds are mixed") {
  const Case made({ActivationRule::kObserved, 0});
  made.quantizer->output()->set_scale(0.05);
  for (const double blend : {0.0, 0.4}) {
    made.quantizer->set_blend(blend);
    require_close(made.pieces(6, 5), made.whole(6));
  }
}

TEST_CASE("no allocation holds all rounded logits, neither while their scale calibrates nor later") {
  constexpr int64_t kWide = 1000, kRows = 40, kChunk = 8;
  at::manual_seed(2);
  const at::Tensor hidden = at::randn({1, kRows + 1, kWidth}).requires_grad_();
  const at::Tensor weight = at::randn({kWide, kWidth});
  const at::Tensor tokens = at::randint(kWide, {1, kRows + 1}, at::TensorOptions(at::kLong));
  const TeacherAnswer teacher{at::randn({1, kRows + 1, kWidth}), Head{at::randn({kWide, kWidth})}};
  for (const auto rule : {ActivationRule::kObserved, ActivationRule::kLearned}) {
    const auto quantizer = std::make_shared<Quantizer>("w", qat::Scheme{"int4_channel"}, qat::Estimator{});
    quantizer->add_activations({"int8_tensor_static", "int8_tensor_static"}, {rule, 1}, at::kCPU);
    for (int pass = 0; pass < 2; ++pass) {
      Recorder recorder;
      recorder.watch(kWide * kWidth * sizeof(float));
      head_loss(hidden, {weight, {}, quantizer, 6.0}, teacher, tokens, {}, kChunk).backward();
      REQUIRE(recorder.hits() == 1);  // the table, which is smaller than all logits
      REQUIRE(recorder.largest() == kWide * kWidth * sizeof(float));
      REQUIRE(quantizer->output()->batches().item<int64_t>() == 1);
    }
    Recorder recorder;
    head_loss(hidden, {weight, {}, quantizer, 6.0}, teacher, tokens, {}, kRows).backward();
    REQUIRE(recorder.largest() == kWide * kRows * sizeof(float));
  }
}
