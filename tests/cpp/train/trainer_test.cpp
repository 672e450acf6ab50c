#include "qat/train/trainer.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <map>
#include <stdexcept>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/ops/ops.hpp"
#include "train/tiny_run.hpp"

namespace {

using qat::train::Options;
using qat::train::Outcome;
using qat::train::StepReport;
using qat::train::TokenData;
using qat::train::Trainer;

std::unique_ptr<Trainer> make_trainer(TinySetup& setup, const Options& options,
                                      const std::string& folder = "") {
  return std::make_unique<Trainer>(*setup.model, setup.student_function(),
                                   options.objective.needs_teacher() ? setup.teacher_function() : nullptr,
                                   tiny_data(), options, folder);
}

std::vector<StepReport> train(TinySetup& setup, const Options& options) {
  std::vector<StepReport> reports;
  const auto trainer = make_trainer(setup, options);
  trainer->set_progress([&](const StepReport& report) {
    reports.push_back(report);
    return true;
  });
  REQUIRE(trainer->run() == Outcome::kFinished);
  return reports;
}

at::Tensor flat(torch::nn::Module& module) {
  std::vector<at::Tensor> parts;
  for (const at::Tensor& parameter : module.parameters()) parts.push_back(parameter.detach().reshape({-1}));
  return at::cat(parts);
}

double difference(torch::nn::Module& a, torch::nn::Module& b) {
  return (flat(a) - flat(b)).abs().max().item<double>();
}

/// One parameter of the reference loop: plain AdamW in double, straight-through by hand.
struct Reference {
  at::Tensor latent, first, second;
  bool quantized;
};

/// The tiny model with double arithmetic and w_hat where the policy quantizes.
at::Tensor reference_logits(std::map<std::string, at::Tensor>& w, const at::Tensor& tokens) {
  const at::Tensor hidden = w["embed.weight"].index_select(0, tokens.reshape({-1}));
  const at::Tensor inner = at::tanh(hidden.matmul(w["up.weight"].t()) + w["up.bias"]);
  return (inner.matmul(w["head.weight"].t()) + w["head.bias"]).view({tokens.size(0), tokens.size(1), -1});
}

}  // namespace

TEST_CASE(
    "training equals a plain loop in double: objective, straight-through gradient, clip, AdamW, schedule") {
  Options options = tiny_options();
  options.steps = 4;
  options.weight_decay = 0.1;
  options.clip_norm = 0.2;
  options.objective = {0.6, 0.4, 2};
  TinySetup setup;
  std::map<std::string, Reference> reference;
  std::map<std::string, at::Tensor> teacher;
  for (const auto& item : setup.teacher->named_parameters()) {
    const at::Tensor value = item.value().detach().to(at::kDouble);
    teacher[item.key()] = value.clone();
    const bool quantized = item.key() == "up.weight" || item.key() == "head.weight";
    reference[item.key()] = {value.clone(), at::zeros_like(value), at::zeros_like(value), quantized};
  }
  const TokenData data = tiny_data();
  const double t = options.objective.temperature;
  std::vector<double> losses, norms;
  for (int64_t step = 1; step <= options.steps; ++step) {
    const at::Tensor tokens = data.batch(step - 1, options.batch_size, options.sequence_length, options.seed);
    std::map<std::string, at::Tensor> weights;
    for (auto& [name, p] : reference) {
      const at::Tensor latent = p.latent.to(at::kFloat);
      const at::Tensor used = p.quantized ? qat::ops::fake_quantize(latent, "int2_channel") : latent;
      weights[name] = used.to(at::kDouble).requires_grad_();
    }
    const at::Tensor z = reference_logits(weights, tokens).slice(1, 0, -1).reshape({-1, kTinyVocabulary});
    const at::Tensor y = reference_logits(teacher, tokens).slice(1, 0, -1).reshape({-1, kTinyVocabulary});
    const at::Tensor log_p = at::log_softmax(y / t, 1), log_q = at::log_softmax(z / t, 1);
    const at::Tensor kl = (log_p.exp() * (log_p - log_q)).sum(1).mean() * t * t;
    const at::Tensor target = tokens.slice(1, 1).reshape({-1, 1});
    const at::Tensor loss = 0.6 * kl - 0.4 * at::log_softmax(z, 1).gather(1, target).mean();
    loss.backward();
    losses.push_back(loss.item<double>());
    double squares = 0;
    for (auto& [name, w] : weights) squares += w.grad().square().sum().item<double>();
    norms.push_back(std::sqrt(squares));
    const double clip = std::min(1.0, options.clip_norm / norms.back());
    const double rate = learning_rate_at(options, step);
    for (auto& [name, p] : reference) {
      const at::Tensor g = weights[name].grad() * clip;
      p.latent.mul_(1 - rate * options.weight_decay);
      p.first = options.beta1 * p.first + (1 - options.beta1) * g;
      p.second = options.beta2 * p.second + (1 - options.beta2) * g * g;
      const at::Tensor m = p.first / (1 - std::pow(options.beta1, step));
      const at::Tensor v = p.second / (1 - std::pow(options.beta2, step));
      p.latent.sub_(rate * m / (v.sqrt() + options.epsilon));
    }
  }

  const auto reports = train(setup, options);
  REQUIRE(norms[0] > options.clip_norm);
  for (int64_t i = 0; i < options.steps; ++i) {
    // float32 against double arithmetic: 2^-24 per operation, a few dozen operations deep.
    REQUIRE(reports[i].loss == Approx(losses[i]).epsilon(1e-5));
    REQUIRE(reports[i].gradient_norm == Approx(norms[i]).epsilon(1e-4));
    REQUIRE(reports[i].learning_rate == learning_rate_at(options, i + 1));
  }
  for (const auto& item : setup.student->named_parameters()) {
    CAPTURE(item.key());
    const at::Tensor gap = (item.value().detach().to(at::kDouble) - reference[item.key()].latent).abs();
    // A step moves a weight by about the learning rate, 1e-2; its relative error is that of the gradient.
    REQUIRE(gap.max().item<double>() < 2e-5);
  }
}

TEST_CASE("training wins back most of what two bits lost") {
  TinySetup setup;
  Options options = tiny_options();
  options.steps = 150;
  const auto reports = train(setup, options);
  REQUIRE(reports.size() == 150);
  double last = 0;
  for (std::size_t i = 140; i < 150; ++i) last += reports[i].loss / 10;
  REQUIRE(last < 0.4 * reports[0].loss);
}

TEST_CASE("cross-entropy alone needs no teacher and learns the text") {
  TinySetup setup;
  Options options = tiny_options();
  options.steps = 120;
  options.objective = {0, 1, 1};
  const auto reports = train(setup, options);
  REQUIRE(reports.front().loss > 2.4);  // about log 17
  REQUIRE(reports.back().loss < 1.6);   // three successors per token: log 3 = 1.1
}

TEST_CASE("two micro-batches of one equal one batch of two") {
  TinySetup whole, parts;
  Options options = tiny_options();
  train(whole, options);
  options.batch_size = 1;
  options.accumulate = 2;
  train(parts, options);
  // The same sums in another order: float32 rounding of gradients, amplified by Adam where they are near 0.
  REQUIRE(difference(*whole.student, *parts.student) < 2e-4);
  REQUIRE(difference(*whole.student, *whole.teacher) > 1e-2);
}

TEST_CASE("a run repeats bit for bit, and another seed is another run") {
  TinySetup a(0.1), b(0.1), c(0.1);
  Options options = tiny_options();
  train(a, options);
  at::manual_seed(1234);  // what others drew before does not matter
  train(b, options);
  REQUIRE(difference(*a.student, *b.student) == 0);
  options.seed = 1;
  train(c, options);
  REQUIRE(difference(*a.student, *c.student) > 0);
}

TEST_CASE("bfloat16 compute trains float32 latents") {
  TinySetup setup;
  Options options = tiny_options();
  options.steps = 60;
  options.compute_dtype = "bfloat16";
  at::ScalarType seen = at::kFloat;
  Trainer trainer(
      *setup.model,
      [&](const at::Tensor& tokens) {
        const at::Tensor logits = setup.student->forward(tokens);
        seen = logits.scalar_type();
        return logits;
      },
      setup.teacher_function(), tiny_data(), options, "");
  double first = 0, last = 0;
  trainer.set_progress([&](const StepReport& report) {
    (report.step == 1 ? first : last) = report.loss;
    return true;
  });
  trainer.run();
  REQUIRE(seen == at::kBFloat16);
  REQUIRE(setup.student->up->weight.scalar_type() == at::kFloat);
  REQUIRE(last < 0.7 * first);
}

TEST_CASE("frozen parameters stay, tied ones move together, and requires_grad is put back") {
  TinySetup setup;
  const at::Tensor embed = setup.student->embed->weight.detach().clone();
  const at::Tensor bias = setup.student->up->bias.detach().clone();
  setup.student->head->bias.set_requires_grad(false);
  Options options = tiny_options();
  options.frozen = {"embed", "up\\.bias"};
  train(setup, options);
  REQUIRE(setup.student->embed->weight.equal(embed));
  REQUIRE(setup.student->up->bias.equal(bias));
  REQUIRE_FALSE(setup.student->up->weight.equal(setup.teacher->up->weight));
  REQUIRE_FALSE(setup.student->head->bias.equal(setup.teacher->head->bias));
  REQUIRE(setup.student->embed->weight.requires_grad());
  REQUIRE_FALSE(setup.student->head->bias.requires_grad());
  REQUIRE_FALSE(setup.student->up->weight.grad().defined());
}

namespace {

qat::Quantizer& quantizer_of(TinySetup& setup, const std::string& name) {
  for (std::size_t i = 0; i < setup.model->slots().size(); ++i) {
    if (setup.model->slots()[i].name == name) return *setup.model->quantizers()[i];
  }
  throw std::runtime_error(name);
}

/// AdamW in double, of one tensor.
struct Adam {
  at::Tensor value, unit, first, second;

  explicit Adam(const at::Tensor& start, const at::Tensor& units = {})
      : value(start.detach().to(at::kDouble)),
        unit(units.defined() ? units : at::ones({1}, at::kDouble)),
        first(at::zeros_like(value)),
        second(at::zeros_like(value)) {}

  void update(const at::Tensor& gradient, double rate, int64_t step, const Options& options) {
    const at::Tensor g = gradient.to(at::kDouble);
    first = options.beta1 * first + (1 - options.beta1) * g;
    second = options.beta2 * second + (1 - options.beta2) * g * g;
    const at::Tensor m = first / (1 - std::pow(options.beta1, step));
    const at::Tensor v = second / (1 - std::pow(options.beta2, step));
    value = value - rate * unit * m / (v.sqrt() + options.epsilon);
  }
};

}  // namespace

TEST_CASE("learned scales take AdamW's steps in units of their mean, clipped together with the weights") {
  Options options = tiny_options();
  options.steps = 4;
  options.learning_rate = 1e-3;
  options.scale_learning_rate = 3e-2;
  options.clip_norm = 0.2;
  TinySetup trained(0, tiny_learned_policy()), followed(0, tiny_learned_policy());
  // The same gradients, by a loop of ordinary steps.
  std::vector<at::Tensor> leaves = followed.student->parameters();
  std::vector<Adam> reference(leaves.begin(), leaves.end());
  for (const auto& scale : followed.model->scale_parameters()) {
    leaves.push_back(scale.value);
    reference.emplace_back(scale.value, scale.value.detach().abs().mean().to(at::kDouble));
  }
  REQUIRE(leaves.size() == reference.size());
  const std::size_t weights = followed.student->parameters().size();
  for (int64_t step = 1; step <= options.steps; ++step) {
    const at::Tensor tokens = tiny_data().batch(step - 1, 2, 8, 0);
    at::Tensor loss;
    {
      const auto scope = followed.model->quantized();
      loss = qat::train::objective_loss(followed.student->forward(tokens),
                                        followed.teacher->forward(tokens).detach(), tokens, {});
    }
    loss.backward();
    double squares = 0;
    for (const at::Tensor& leaf : leaves)
      squares += leaf.grad().to(at::kDouble).square().sum().item<double>();
    REQUIRE(std::sqrt(squares) > options.clip_norm);
    const double clip = options.clip_norm / std::sqrt(squares), rate = learning_rate_at(options, step);
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      const double own = i < weights ? rate : options.scale_learning_rate * rate / options.learning_rate;
      reference[i].update(leaves[i].grad() * clip, own, step, options);
      leaves[i].mutable_grad() = at::Tensor();
      leaves[i].detach().copy_(reference[i].value);
    }
  }
  train(trained, options);
  // A step moves a weight by 1e-3, a scale (about 0.1) by 3e-3; both are float32 from double at each step.
  REQUIRE(difference(*trained.student, *followed.student) < 1e-6);
  const auto got = trained.model->scale_parameters();
  for (std::size_t i = 0; i < got.size(); ++i) {
    CAPTURE(got[i].name);
    REQUIRE((got[i].value - leaves[weights + i]).abs().max().item<double>() < 1e-6);
  }
  TinySetup fresh(0, tiny_learned_policy());
  const at::Tensor moved = got[0].value - fresh.model->scale_parameters()[0].value;
  REQUIRE(moved.abs().max().item<double>() > 1e-3);
}

TEST_CASE(
    "scales are held by rate 0, by a frozen weight and by their own name, and are released afterwards") {
  const auto changed = [](const std::function<void(Options&)>& change) {
    TinySetup setup(0, tiny_learned_policy());
    std::vector<at::Tensor> before;
    for (const auto& scale : setup.model->scale_parameters()) before.push_back(scale.value.detach().clone());
    Options options = tiny_options();
    change(options);
    train(setup, options);
    std::vector<std::string> names;
    for (std::size_t i = 0; i < before.size(); ++i) {
      const auto scale = setup.model->scale_parameters()[i];
      if (!scale.value.equal(before[i])) names.push_back(scale.name);
      REQUIRE(scale.value.requires_grad());
      REQUIRE_FALSE(scale.value.grad().defined());
    }
    return names;
  };
  using Names = std::vector<std::string>;
  REQUIRE(changed([](Options&) {}) == Names{"up.weight_scales", "head.weight_scales"});
  REQUIRE(changed([](Options& o) { o.scale_learning_rate = 0; }).empty());
  REQUIRE(changed([](Options& o) { o.frozen = {"up"}; }) == Names{"head.weight_scales"});
  REQUIRE(changed([](Options& o) { o.frozen = {"head\\.weight_scales"}; }) == Names{"up.weight_scales"});
}

TEST_CASE("learned scales of other shapes train by the same relative rate") {
  // Two layers whose weights differ a hundredfold: their scales move by the same share of themselves.
  TinySetup setup(0, tiny_learned_policy());
  {
    const c10::NoGradGuard no_grad;
    setup.student->up->weight.div_(100);
    setup.model->initialize_scales();
  }
  Options options = tiny_options();
  options.steps = 1;
  options.warmup = 0;
  options.final_learning_rate = 1;
  options.scale_learning_rate = 1e-2;
  const at::Tensor up = quantizer_of(setup, "up.weight").scales().detach().clone();
  const at::Tensor head = quantizer_of(setup, "head.weight").scales().detach().clone();
  train(setup, options);
  const auto share = [](const at::Tensor& before, const at::Tensor& after) {
    return ((after - before).abs() / before.abs().mean()).max().item<double>();
  };
  // Adam's first step is the rate itself, up to epsilon against the gradient and float32 rounding.
  REQUIRE(share(up, quantizer_of(setup, "up.weight").scales().detach()) == Approx(1e-2).epsilon(1e-3));
  REQUIRE(share(head, quantizer_of(setup, "head.weight").scales().detach()) == Approx(1e-2).epsilon(1e-3));
}
