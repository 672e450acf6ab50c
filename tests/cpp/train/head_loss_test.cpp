// The loss from hidden states: the same numbers as from full logits, which never exist.

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/topk.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/train/objective.hpp"
#include "train/allocation_recorder.hpp"
#include "train/plain_objective.hpp"

namespace {

using qat::Head;
using qat::Quantizer;
using qat::train::head_loss;
using qat::train::Objective;
using qat::train::objective_loss;
using qat::train::TeacherAnswer;

constexpr int64_t kBatch = 3, kTokens = 5, kWidth = 32, kVocabulary = 19, kTop = 4;

struct Case {
  at::Tensor hidden, weight, bias, teacher_hidden, teacher_weight, tokens;

  explicit Case(at::ScalarType dtype, int64_t vocabulary = kVocabulary) {
    at::manual_seed(11);
    const auto draw = [&](at::IntArrayRef shape) {
      return at::randn(shape, at::TensorOptions(at::kDouble)).to(dtype);
    };
    hidden = draw({kBatch, kTokens, kWidth});
    weight = draw({vocabulary, kWidth});
    bias = draw({vocabulary});
    teacher_hidden = draw({kBatch, kTokens, kWidth});
    teacher_weight = draw({vocabulary, kWidth});
    tokens = at::randint(vocabulary, {kBatch, kTokens}, at::TensorOptions(at::kLong));
    for (at::Tensor* leaf : {&hidden, &weight, &bias}) leaf->requires_grad_();
  }

  at::Tensor logits() const { return at::matmul(hidden, weight.t()) + bias; }
  at::Tensor teacher_logits() const { return at::matmul(teacher_hidden, teacher_weight.t()); }
  Head head() const { return {weight, bias}; }

  /// The teacher's kTop best outcomes and the rest, as a cache holds them.
  TeacherAnswer top_answer(double temperature) const {
    const at::Tensor log_p = at::log_softmax(teacher_logits().slice(1, 0, -1) / temperature, -1);
    const at::Tensor ids = std::get<0>(std::get<1>(at::topk(log_p, kTop)).sort(-1));
    const at::Tensor rest = at::logsumexp(log_p.scatter(-1, ids, -INFINITY), -1, true);
    return {ids, at::cat({log_p.gather(-1, ids), rest}, -1)};
  }
};

/// The definition with ordinary differentiable operators, from the teacher's logits or its k + 1 outcomes.
at::Tensor composed(const Case& made, const TeacherAnswer& teacher, const Objective& objective) {
  const double t = objective.temperature;
  const at::Tensor z = made.logits().slice(1, 0, -1);
  at::Tensor log_q = at::log_softmax(z / t, -1), log_p;
  if (teacher.ids.defined()) {
    log_p = teacher.log_p;
    const at::Tensor rest = at::logsumexp(log_q.scatter(-1, teacher.ids, -INFINITY), -1, true);
    log_q = at::cat({log_q.gather(-1, teacher.ids), rest}, -1);
  } else {
    log_p = at::log_softmax(made.teacher_logits().slice(1, 0, -1) / t, -1);
  }
  const at::Tensor target = made.tokens.slice(1, 1).reshape({-1});
  const at::Tensor known = at::log_softmax(made.teacher_logits().slice(1, 0, -1), -1).flatten(0, 1);
  const double certainty = known.gather(1, target.unsqueeze(1)).exp().mean().item<double>();
  return plain_objective(objective, log_p.flatten(0, 1), log_q.flatten(0, 1),
                         at::log_softmax(z, -1).flatten(0, 1), target, certainty);
}

double worst(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

}  // namespace

TEST_CASE("head_loss and its gradients equal autograd through the definition, in float64, for any piece") {
  const Case made(at::kDouble);
  for (const Objective& objective : all_objectives()) {
    const TeacherAnswer answers[] = {{made.teacher_hidden, Head{made.teacher_weight}},
                                     made.teacher_logits(),
                                     made.top_answer(objective.temperature)};
    for (const TeacherAnswer& answer : answers) {
      if (answer.ids.defined() && objective.needs_confidence()) continue;
      const at::Tensor expected = composed(made, answer, objective);
      const auto reference = torch::autograd::grad({expected}, {made.hidden, made.weight, made.bias});
      for (const int64_t chunk : {0, 1, 5, 100}) {
        CAPTURE(objective.kl, objective.ce, objective.temperature, objective.reverse_kl, objective.jsd,
                objective.cakld, chunk);
        const at::Tensor loss = head_loss(made.hidden, made.head(), answer, made.tokens, objective, chunk);
        // Sums of a few hundred doubles of magnitude up to 30, in different orders.
        REQUIRE(worst(loss, expected) < 1e-13);
        const auto got = torch::autograd::grad({loss}, {made.hidden, made.weight, made.bias});
        for (std::size_t i = 0; i < 3; ++i) REQUIRE(worst(got[i], reference[i]) < 1e-14);
        REQUIRE(got[0].select(1, kTokens - 1).abs().max().item<double>() == 0);
      }
    }
  }
}

TEST_CASE("the three forms of a teacher give the same loss from full logits, too") {
  const Case made(at::kDouble);
  const Objective objective{0.8, 0.2, 1.5};
  const at::Tensor logits = made.logits();
  const auto loss = [&](const TeacherAnswer& answer) {
    return objective_loss(logits, answer, made.tokens, objective).item<double>();
  };
  const double full = loss(made.teacher_logits());
  REQUIRE(loss({made.teacher_hidden, Head{made.teacher_weight}}) == full);
  const double top = loss(made.top_answer(1.5));
  // The same sum in another order.
  REQUIRE(top == Approx(composed(made, made.top_answer(1.5), objective).item<double>()).epsilon(1e-14));
  REQUIRE(top < full);  // merging outcomes loses divergence
  REQUIRE(top > 0.5 * full);
}

TEST_CASE("the rest's probability keeps its digits where 1 minus the top would have none") {
  // Student: token 0 at logit 60, the others at 0: the rest holds 3 e^-60 of the mass.
  const at::Tensor tokens = at::zeros({1, 2}, at::kLong);
  at::Tensor student = at::zeros({1, 2, 4}, at::kDouble);
  student.select(2, 0).fill_(60);
  student.requires_grad_();
  const at::Tensor ids = at::zeros({1, 1, 1}, at::kLong);
  const at::Tensor half = at::full({1, 1, 2}, std::log(0.5), at::kDouble);
  const at::Tensor loss = objective_loss(student, {ids, half}, tokens, {});
  const double log_rest = std::log(3.0) - 60;
  REQUIRE(loss.item<double>() == Approx(-std::log(2.0) - 0.5 * log_rest).epsilon(1e-14));
  const at::Tensor gradient = torch::autograd::grad({loss}, {student})[0][0][0];
  REQUIRE(gradient[0].item<double>() == Approx(0.5).epsilon(1e-14));
  REQUIRE(gradient[2].item<double>() == Approx(-0.5 / 3).epsilon(1e-14));
}

TEST_CASE("top outcomes of mass 1 and rounded log-probabilities are probabilities all the same") {
  const at::Tensor tokens = at::zeros({1, 2}, at::kLong), ids = at::zeros({1, 1, 1}, at::kLong);
  const at::Tensor student = at::zeros({1, 2, 4}, at::kDouble).requires_grad_();
  at::Tensor log_p = at::zeros({1, 1, 2}, at::kDouble);
  log_p.select(2, 1).fill_(-INFINITY);
  REQUIRE(objective_loss(student, {ids, log_p}, tokens, {}).item<double>() == Approx(std::log(4.0)));
  log_p.fill_(-3);  // two outcomes of equal mass, whose sum is not 1
  const at::Tensor loss = objective_loss(student, {ids, log_p}, tokens, {});
  REQUIRE(loss.item<double>() == Approx(0.5 * std::log(2.0) + 0.5 * std::log(0.5 / 0.75)));
  REQUIRE(std::abs(torch::autograd::grad({loss}, {student})[0].sum().item<double>()) < 1e-15);
}

TEST_CASE("a quantized head: w_hat forward, its estimator backward") {
  const Objective objective{0.5, 0.5, 1};
  for (const auto kind : {qat::EstimatorKind::kSte, qat::EstimatorKind::kClippedSte}) {
    Case made(at::kFloat);
    const auto quantizer =
        std::make_shared<Quantizer>("w", qat::Scheme{"int2_channel"}, qat::Estimator{kind});
    const TeacherAnswer answer = made.teacher_logits();
    const at::Tensor expected = objective_loss(quantizer->linear(made.hidden, made.weight, made.bias), answer,
                                               made.tokens, objective);
    const auto reference = torch::autograd::grad({expected}, {made.hidden, made.weight, made.bias});
    const at::Tensor loss =
        head_loss(made.hidden, {made.weight, made.bias, quantizer}, answer, made.tokens, objective, 4);
    const auto got = torch::autograd::grad({loss}, {made.hidden, made.weight, made.bias});
    // float32 sums of 32 products of magnitude up to 10, in another order.
    REQUIRE(worst(loss, expected) < 1e-5);
    for (std::size_t i = 0; i < 3; ++i) REQUIRE(worst(got[i], reference[i]) < 1e-5);
    REQUIRE(got[1].abs().max().item<double>() > 0.01);
    const auto zeros = [](const at::Tensor& g) { return g.eq(0).sum().item<int64_t>(); };
    REQUIRE(zeros(got[1]) == zeros(reference[1]));
    quantizer->set_enabled(false);
    const at::Tensor plain =
        head_loss(made.hidden, {made.weight, made.bias, quantizer}, answer, made.tokens, objective);
    REQUIRE(plain.equal(head_loss(made.hidden, made.head(), answer, made.tokens, objective)));
  }
}

TEST_CASE("a head with learned scales, rounding blended in: gradients of latent and scales") {
  const Objective objective{0.5, 0.5, 1};
  Case made(at::kFloat);
  const auto quantizer =
      std::make_shared<Quantizer>("w", qat::Scheme{"int2_channel"},
                                  qat::Estimator{qat::EstimatorKind::kClippedSte, qat::ScaleRule::kLearned});
  quantizer->initialize_scales(made.weight);
  const at::Tensor scales = quantizer->scales();
  const TeacherAnswer answer = made.teacher_logits();
  for (const double blend : {1.0, 0.3, 0.0}) {
    CAPTURE(blend);
    quantizer->set_blend(blend);
    const at::Tensor expected = objective_loss(quantizer->linear(made.hidden, made.weight, made.bias), answer,
                                               made.tokens, objective);
    const at::Tensor loss =
        head_loss(made.hidden, {made.weight, made.bias, quantizer}, answer, made.tokens, objective, 4);
    // float32 sums of 32 products of magnitude up to 10, in another order.
    REQUIRE(worst(loss, expected) < 1e-5);
    const at::Tensor leaves[] = {made.hidden, made.weight, made.bias, scales};
    const auto grads = [&](const at::Tensor& value) {
      return torch::autograd::grad({value}, {leaves[0], leaves[1], leaves[2], leaves[3]}, {}, {}, false,
                                   /*allow_unused=*/true);
    };
    const auto reference = grads(expected), got = grads(loss);
    for (std::size_t i = 0; i < 3; ++i) REQUIRE(worst(got[i], reference[i]) < 1e-5);
    REQUIRE(got[3].defined() == (blend > 0));
    if (blend > 0) {
      REQUIRE(worst(got[3], reference[3]) < 1e-5);
      REQUIRE(got[3].abs().max().item<double>() > 1e-3);
    }
  }
}

TEST_CASE("a head with learned scales: they get their gradient, with and without the latent's") {
  const Objective objective{0.5, 0.5, 1};
  Case made(at::kFloat);
  const auto quantizer = std::make_shared<Quantizer>(
      "w", qat::Scheme{"q4_0"}, qat::Estimator{qat::EstimatorKind::kClippedSte, qat::ScaleRule::kLearned});
  quantizer->initialize_scales(made.weight, qat::ScaleRule::kReference);
  quantizer->set_scales(quantizer->scales().detach() * 0.8);  // clips the largest weights
  const at::Tensor& scales = quantizer->scales();
  const TeacherAnswer answer = made.teacher_logits();
  const at::Tensor expected =
      objective_loss(quantizer->linear(made.hidden, made.weight, made.bias), answer, made.tokens, objective);
  const auto reference = torch::autograd::grad({expected}, {made.hidden, made.weight, made.bias, scales});
  const auto loss = [&](const at::Tensor& weight) {
    return head_loss(made.hidden, {weight, made.bias, quantizer}, answer, made.tokens, objective, 4);
  };
  const auto got = torch::autograd::grad({loss(made.weight)}, {made.hidden, made.weight, made.bias, scales});
  // float32 sums of 32 products of magnitude up to 10, in another order.
  for (std::size_t i = 0; i < 4; ++i) REQUIRE(worst(got[i], reference[i]) < 1e-5);
  REQUIRE(got[3].abs().min().item<double>() > 0.0);
  const auto held = torch::autograd::grad({loss(made.weight.detach())}, {scales});
  REQUIRE(held[0].equal(got[3]));
  scales.set_requires_grad(false);
  REQUIRE(torch::autograd::grad({loss(made.weight)}, {made.weight})[0].equal(got[1]));
}

TEST_CASE("in bfloat16 a single piece has the bits of full logits, and pieces differ by its rounding") {
  const Case made(at::kBFloat16, 5000);  // wider than a block of the table's gradient
  const Objective objective{1, 0, 1};
  const Head head{made.weight};
  const TeacherAnswer answer{made.teacher_hidden, Head{made.teacher_weight}};
  const at::Tensor full =
      objective_loss(at::matmul(made.hidden, made.weight.t()), made.teacher_logits(), made.tokens, objective);
  const auto reference = torch::autograd::grad({full}, {made.hidden, made.weight});
  for (const int64_t chunk : {0, 5}) {
    const at::Tensor loss = head_loss(made.hidden, head, answer, made.tokens, objective, chunk);
    REQUIRE(loss.scalar_type() == at::kFloat);
    const auto got = torch::autograd::grad({loss}, {made.hidden, made.weight});
    REQUIRE(got[0].scalar_type() == at::kBFloat16);
    REQUIRE(got[1].scalar_type() == at::kBFloat16);
    // Logits of magnitude up to 20 may round to a neighbour, 2^-4 away; averaged over 12 positions.
    REQUIRE(worst(loss, full) < 0.02);
    for (std::size_t i = 0; i < 2; ++i) {
      const double size = reference[i].to(at::kFloat).abs().max().item<double>();
      REQUIRE(worst(got[i].to(at::kFloat), reference[i].to(at::kFloat)) < 0.03 * size);
    }
  }
}

TEST_CASE("no allocation holds all logits, and the quantized table is made once") {
  constexpr int64_t kWide = 1000, kRows = 40, kChunk = 8;
  at::manual_seed(2);
  const at::Tensor hidden = at::randn({1, kRows + 1, kWidth}).requires_grad_();
  const at::Tensor weight = at::randn({kWide, kWidth}).requires_grad_();
  const at::Tensor tokens = at::randint(kWide, {1, kRows + 1}, at::TensorOptions(at::kLong));
  const auto quantizer = std::make_shared<Quantizer>("w", qat::Scheme{"int4_channel"}, qat::Estimator{});
  const TeacherAnswer answer{at::randn({1, kRows + 1, kWidth}), Head{at::randn({kWide, kWidth})}};
  Recorder recorder;
  recorder.watch(kWide * kWidth * sizeof(float));
  at::Tensor loss;
  SECTION("a frozen table") {
    loss = head_loss(hidden, {weight.detach(), {}, quantizer}, answer, tokens, {}, kChunk);
    loss.backward();
    REQUIRE(recorder.hits() == 1);
    REQUIRE(recorder.largest() == kWide * kWidth * sizeof(float));
  }
  SECTION("a trained table: its gradient, too") {
    loss = head_loss(hidden, {weight, {}, quantizer}, answer, tokens, {}, kChunk);
    loss.backward();
    REQUIRE(recorder.hits() == 2);
    REQUIRE(recorder.largest() == kWide * kWidth * sizeof(float));
  }
  SECTION("all rows in one piece: this is what the recorder sees then") {
    loss = head_loss(hidden, {weight.detach(), {}, quantizer}, answer, tokens, {}, kRows);
    REQUIRE(recorder.largest() == kWide * kRows * sizeof(float));
  }
}

TEST_CASE("head_loss computes only the gradients that are wanted, scales them, and refuses a second one") {
  const Case made(at::kDouble);
  const TeacherAnswer answer = made.teacher_logits();
  const auto loss = [&](const at::Tensor& hidden, const Head& head) {
    return head_loss(hidden, head, answer, made.tokens, {}, 4);
  };
  REQUIRE_FALSE(loss(made.hidden.detach(), {made.weight.detach()}).requires_grad());
  const at::Tensor only_hidden = loss(made.hidden, {made.weight.detach(), made.bias.detach()});
  const at::Tensor all = loss(made.hidden, made.head());
  const at::Tensor single = torch::autograd::grad({only_hidden}, {made.hidden})[0];
  REQUIRE(single.equal(torch::autograd::grad({all}, {made.hidden})[0]));
  const at::Tensor tripled = torch::autograd::grad({loss(made.hidden, made.head()) * 3}, {made.hidden})[0];
  REQUIRE(worst(tripled, single * 3) < 1e-15);  // one rounding each
  REQUIRE_THROWS_AS(torch::autograd::grad({loss(made.hidden, made.head())}, {made.hidden}, {}, true, true),
                    qat::UnsupportedError);
  const c10::NoGradGuard no_grad;
  REQUIRE_FALSE(loss(made.hidden, made.head()).requires_grad());
}

TEST_CASE("head_loss names bad arguments") {
  const Case made(at::kFloat);
  const TeacherAnswer good = made.teacher_logits();
  const auto message = [&](const at::Tensor& hidden, const Head& head, const TeacherAnswer& answer,
                           int64_t chunk = 0) -> std::string {
    try {
      head_loss(hidden, head, answer, made.tokens, {}, chunk);
    } catch (const qat::ArgumentError& error) {
      return error.what();
    }
    return "accepted";
  };
  REQUIRE(message(made.hidden, made.head(), good) == "accepted");
  REQUIRE_THAT(message(made.hidden.slice(1, 1), made.head(), good), Catch::Contains("hidden"));
  REQUIRE_THAT(message(made.hidden, {made.weight.slice(1, 1)}, good), Catch::Contains("head.weight"));
  REQUIRE_THAT(message(made.hidden, {made.weight, made.bias.slice(0, 1)}, good),
               Catch::Contains("head.bias"));
  REQUIRE_THAT(message(made.hidden, made.head(), good, -1), Catch::Contains("chunk"));
  REQUIRE_THAT(message(made.hidden, made.head(), {}), Catch::Contains("teacher"));
  REQUIRE_THAT(
      message(made.hidden, made.head(), {made.teacher_hidden, Head{made.teacher_weight.slice(0, 1)}}),
      Catch::Contains("teacher.head.weight"));
  const TeacherAnswer top = made.top_answer(1);
  REQUIRE_THAT(message(made.hidden, made.head(), {top.ids.slice(1, 1), top.log_p}), Catch::Contains("ids"));
  REQUIRE_THAT(message(made.hidden, made.head(), {top.ids, top.log_p.slice(2, 1)}), Catch::Contains("log_p"));
  const Objective unsure{0, 0, 1, 0, 0, 0.5, 1};
  REQUIRE_THROWS_WITH(head_loss(made.hidden, made.head(), top, made.tokens, unsure),
                      Catch::Contains("head_loss: objective.cakld_beta: expected a number in [0, 1]"));
  REQUIRE_THROWS_AS(objective_loss(made.logits(), top, made.tokens, unsure), qat::ArgumentError);
}

TEST_CASE("a capped head: the loss and its gradients are those of capped logits") {
  for (const int64_t chunk : {int64_t{0}, int64_t{5}}) {
    const Case pieces(at::kDouble), whole(at::kDouble);
    Head student = pieces.head(), teacher{pieces.teacher_weight};
    // Logits of some 5: the cap bends all of them, and turns none into a constant.
    student.softcap = teacher.softcap = 4.0;
    const Objective objective{.kl = 0.7, .ce = 0.3};
    const at::Tensor got =
        head_loss(pieces.hidden, student, {pieces.teacher_hidden, teacher}, pieces.tokens, objective, chunk);
    got.backward();
    const auto capped = [](const at::Tensor& logits) { return (logits / 4.0).tanh() * 4.0; };
    const at::Tensor expected =
        objective_loss(capped(whole.logits()), {capped(whole.teacher_logits())}, whole.tokens, objective);
    expected.backward();
    CHECK(worst(got, expected) < 1e-12);  // float64 sums in another order
    CHECK(worst(pieces.hidden.grad(), whole.hidden.grad()) < 1e-12);
    CHECK(worst(pieces.weight.grad(), whole.weight.grad()) < 1e-12);
    CHECK(worst(pieces.bias.grad(), whole.bias.grad()) < 1e-12);
    CHECK(worst(student.logits(pieces.hidden), capped(pieces.logits())) < 1e-12);
  }
}
