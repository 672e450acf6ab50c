#include "qat/train/objective.hpp"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "train/plain_objective.hpp"

namespace {

using qat::train::Objective;
using qat::train::objective_loss;

constexpr int64_t kBatch = 2, kTokens = 5, kVocabulary = 70001;  // wider than a block of logits

struct Case {
  at::Tensor student, teacher, tokens;
};

Case make_case(at::ScalarType dtype, int64_t vocabulary = 13) {
  at::manual_seed(3);
  const at::TensorOptions options = at::TensorOptions(at::kDouble);
  Case made;
  made.student = (at::randn({kBatch, kTokens, vocabulary}, options) * 3).to(dtype);
  made.teacher = (at::randn({kBatch, kTokens, vocabulary}, options) * 3).to(dtype);
  made.tokens = at::randint(vocabulary, {kBatch, kTokens}, at::TensorOptions(at::kLong));
  return made;
}

/// The same loss from ordinary differentiable operators, in double.
at::Tensor composed(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& tokens,
                    const Objective& objective) {
  const double t = objective.temperature;
  const at::Tensor z = student.slice(1, 0, -1).reshape({-1, student.size(2)});
  const at::Tensor y = teacher.slice(1, 0, -1).reshape({-1, student.size(2)});
  const at::Tensor target = tokens.slice(1, 1).reshape({-1});
  const at::Tensor certainty = at::log_softmax(y, -1).gather(1, target.unsqueeze(1)).exp().mean();
  return plain_objective(objective, at::log_softmax(y / t, -1), at::log_softmax(z / t, -1),
                         at::log_softmax(z, -1), target, certainty.item<double>());
}

at::Tensor gradient(const at::Tensor& loss, const at::Tensor& input) {
  return torch::autograd::grad({loss}, {input})[0];
}

double worst(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

}  // namespace

TEST_CASE("the objective and its gradient equal autograd through the definition, in float64") {
  for (const Objective& objective : all_objectives()) {
    CAPTURE(objective.kl, objective.ce, objective.temperature, objective.reverse_kl, objective.jsd,
            objective.cakld);
    const Case made = make_case(at::kDouble);
    const at::Tensor ours = made.student.clone().requires_grad_(),
                     theirs = made.student.clone().requires_grad_();
    const at::Tensor loss = objective_loss(ours, made.teacher, made.tokens, objective);
    const at::Tensor expected = composed(theirs, made.teacher, made.tokens, objective);
    REQUIRE(loss.scalar_type() == at::kDouble);
    // Both are sums of a few hundred doubles of magnitude up to 10, in different orders.
    REQUIRE(worst(loss, expected) < 1e-13);
    REQUIRE(worst(gradient(loss, ours), gradient(expected, theirs)) < 1e-14);
  }
}

TEST_CASE("a vocabulary wider than a block and bfloat16 logits") {
  const Objective objective{0.5, 0.5, 2};
  const Case made = make_case(at::kBFloat16, kVocabulary);
  const at::Tensor ours = made.student.clone().requires_grad_();
  const at::Tensor theirs = made.student.to(at::kDouble).requires_grad_();
  const at::Tensor loss = objective_loss(ours, made.teacher, made.tokens, objective);
  const at::Tensor expected = composed(theirs, made.teacher.to(at::kDouble), made.tokens, objective);
  REQUIRE(loss.scalar_type() == at::kFloat);
  // float32 log-probabilities of about 15 (2^-24 relative each), averaged.
  REQUIRE(worst(loss, expected) < 1e-5);
  const at::Tensor got = gradient(loss, ours), reference = gradient(expected, theirs);
  REQUIRE(got.scalar_type() == at::kBFloat16);
  // Rounded once to bfloat16, whose 8 significant bits lose at most 2^-8 of a value; 1e-9 covers what float32
  // loses in the difference of two tiny probabilities.
  REQUIRE(((got.to(at::kDouble) - reference).abs() <= reference.abs() / 256 + 1e-9).all().item<bool>());
  REQUIRE(got.slice(1, -1).abs().max().item<double>() == 0);
}

TEST_CASE("the upstream gradient scales, and no gradient is computed when none is wanted") {
  const Case made = make_case(at::kDouble);
  const at::Tensor one = made.student.clone().requires_grad_(), three = made.student.clone().requires_grad_();
  const at::Tensor g1 = gradient(objective_loss(one, made.teacher, made.tokens, {}), one);
  const at::Tensor g3 = gradient(objective_loss(three, made.teacher, made.tokens, {}) * 3, three);
  REQUIRE(worst(g1 * 3, g3) < 1e-15);
  REQUIRE_FALSE(objective_loss(made.student, made.teacher, made.tokens, {}).requires_grad());
  const c10::NoGradGuard no_grad;
  REQUIRE_FALSE(objective_loss(one, made.teacher, made.tokens, {}).requires_grad());
}

TEST_CASE("equal models have no divergence and no gradient") {
  const Case made = make_case(at::kFloat);
  for (const Objective& objective : {Objective{}, Objective{0, 0, 1, 1}, Objective{0, 0, 1, 0, 0, 0.5, 1}}) {
    const at::Tensor student = made.teacher.clone().requires_grad_();
    const at::Tensor loss = objective_loss(student, made.teacher, made.tokens, objective);
    REQUIRE(loss.item<double>() == 0);
    REQUIRE(gradient(loss, student).abs().max().item<double>() == 0);
  }
  const at::Tensor student = made.teacher.clone().requires_grad_();
  const at::Tensor loss = objective_loss(student, made.teacher, made.tokens, {0, 0, 1, 0, 1, 0.3});
  // The mix of two equal float32 logarithms rounds.
  REQUIRE(std::abs(loss.item<double>()) < 1e-6);
  REQUIRE(gradient(loss, student).abs().max().item<double>() < 1e-6);
}

TEST_CASE("a token that the student rules out adds nothing to the divergences from it") {
  const double infinity = std::numeric_limits<double>::infinity();
  const at::Tensor tokens = at::zeros({1, 2}, at::kLong);
  const at::Tensor teacher = at::zeros({1, 2, 3}, at::kDouble);
  at::Tensor logits = at::zeros({1, 2, 3}, at::kDouble);
  logits.select(2, 2).fill_(-infinity);
  const double third = 1.0 / 3;
  for (const double alpha : {0.0, 0.4}) {
    const at::Tensor student = logits.clone().requires_grad_();
    const Objective objective = alpha == 0 ? Objective{0, 0, 1, 1} : Objective{0, 0, 1, 0, 1, alpha};
    const double m = alpha * third + (1 - alpha) * 0.5;  // of the two tokens that are left
    const double divergence = alpha == 0 ? std::log(1.5)
                                         : alpha * third * (2 * std::log(third / m) - std::log(alpha)) +
                                               (1 - alpha) * std::log(0.5 / m);
    const at::Tensor loss = objective_loss(student, teacher, tokens, objective);
    REQUIRE(loss.item<double>() == Approx(divergence).epsilon(1e-14));
    REQUIRE(gradient(loss, student).isfinite().all().item<bool>());
  }
  // What the teacher rules out and the student does not is infinitely wrong.
  const at::Tensor student = teacher.clone().requires_grad_();
  REQUIRE(std::isinf(objective_loss(student, logits, tokens, {0, 0, 1, 1}).item<double>()));
}

TEST_CASE("a token that the teacher rules out adds nothing") {
  const double infinity = std::numeric_limits<double>::infinity();
  const at::Tensor tokens = at::zeros({1, 2}, at::kLong);
  at::Tensor teacher = at::zeros({1, 2, 3}, at::TensorOptions(at::kDouble));
  teacher.select(2, 2).fill_(-infinity);
  const at::Tensor student = at::zeros({1, 2, 3}, at::TensorOptions(at::kDouble)).requires_grad_();
  const at::Tensor loss = objective_loss(student, teacher, tokens, {});
  REQUIRE(loss.item<double>() == Approx(std::log(1.5)).epsilon(1e-14));  // log(1/2) - log(1/3)
  const at::Tensor got = gradient(loss, student)[0][0];
  REQUIRE(got[0].item<double>() == Approx(1.0 / 3 - 0.5));
  REQUIRE(got[2].item<double>() == Approx(1.0 / 3));
}

TEST_CASE("NaN logits give a NaN loss, not a hidden one") {
  const Case made = make_case(at::kFloat);
  at::Tensor student = made.student.clone();
  student[0][1][2] = std::numeric_limits<double>::quiet_NaN();
  REQUIRE(std::isnan(objective_loss(student, made.teacher, made.tokens, {}).item<double>()));
  at::Tensor teacher = made.teacher.clone();
  teacher[1][0][0] = std::numeric_limits<double>::quiet_NaN();
  for (const Objective& objective :
       {Objective{}, Objective{0, 0, 1, 1}, Objective{0, 0, 1, 0, 1}, Objective{0, 0, 1, 0, 0, 0.5, 1}}) {
    REQUIRE(std::isnan(objective_loss(student, made.teacher, made.tokens, objective).item<double>()));
    REQUIRE(std::isnan(objective_loss(made.student, teacher, made.tokens, objective).item<double>()));
  }
}

TEST_CASE("the objective names bad arguments and refuses a double backward") {
  const Case made = make_case(at::kFloat);
  const auto run = [](const at::Tensor& s, const at::Tensor& t, const at::Tensor& x) {
    return objective_loss(s, t, x, {});
  };
  REQUIRE_THROWS_WITH(run(made.student, {}, made.tokens),
                      Catch::Contains("teacher") && Catch::Contains("nothing"));
  REQUIRE_THROWS_WITH(run(made.student, made.teacher.slice(2, 1), made.tokens), Catch::Contains("teacher"));
  REQUIRE_THROWS_WITH(run(made.student.slice(1, 1), made.teacher, made.tokens), Catch::Contains("student"));
  REQUIRE_THROWS_WITH(run(made.student, made.teacher, made.tokens.to(at::kInt)), Catch::Contains("tokens"));
  REQUIRE_THROWS_AS(run(made.student, made.teacher, made.tokens.slice(1, 0, 1)), qat::ArgumentError);

  const at::Tensor student = made.student.clone().requires_grad_();
  const at::Tensor loss = run(student, made.teacher, made.tokens);
  REQUIRE_THROWS_AS(torch::autograd::grad({loss}, {student}, {}, true, /*create_graph=*/true),
                    qat::UnsupportedError);
}
