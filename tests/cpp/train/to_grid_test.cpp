// Schedules that bring weights to the grid and keep them there: held and damped oscillation, PARQ.

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "catch.hpp"
#include "qat/ops/ops.hpp"
#include "train/schedule_run.hpp"

TEST_CASE("weights that turn often are held at a code, others go on") {
  const ScratchFolder folder;
  const Options options = options_with([](Options& o) {
    o.steps = 40;
    o.learning_rate = 5e-2;
    o.final_learning_rate = 1;
    o.oscillation = {0.3, 0.45, 0};
    o.save_every = 1;
    o.telemetry_every = 0;
  });
  Life life(options, folder / "run");
  const at::Tensor latent = life.setup.student->head->weight;
  const std::string name = "head.weight";
  at::Tensor code = codes_of(life.quantizer(3), latent), direction = at::zeros_like(code), held, held_code;
  at::Tensor frequency = at::zeros_like(code).to(at::kDouble);
  life.run([&](const StepReport& report) {
    if (report.step > 1) {
      const at::Tensor saved = tensor_of(folder / "run", "oscillation/held/" + name).to(at::kBool);
      if (held.defined()) {
        // What was held before the last step is still held, at the same code.
        REQUIRE(held.logical_and(saved.logical_not()).any().item<bool>() == false);
        const at::Tensor now = tensor_of(folder / "run", "oscillation/code/" + name);
        REQUIRE(at::where(held, now - held_code, at::zeros_like(now)).abs().max().item<int>() == 0);
      }
      held = saved;
      held_code = tensor_of(folder / "run", "oscillation/code/" + name);
    }
    // By the paper's algorithm from the codes seen; a held weight's own next code is not seen any more.
    const at::Tensor now = codes_of(life.quantizer(3), latent);
    const at::Tensor move = (now - code).sign();
    const at::Tensor turned = move.ne(0).logical_and(move.eq(direction.neg()));
    frequency = 0.3 * turned.to(at::kDouble) + 0.7 * frequency;
    direction = at::where(move.ne(0), move, direction);
    code = now;
    return true;
  });
  held = tensor_of(folder / "run", "oscillation/held/" + name).to(at::kBool);
  REQUIRE(held.any().item<bool>());
  REQUIRE_FALSE(held.all().item<bool>());
  // A weight that never turned twice cannot be above 0.45: it takes 0.3 + 0.7 * 0.3 or so.
  REQUIRE(frequency.gt(0.45).logical_and(held.logical_not()).any().item<bool>() == false);
  // A held latent is the number that ships.
  const auto [codes, scales] = life.quantizer(3).quantize(latent.detach());
  const at::Tensor shipped = qat::ops::dequantize(codes, scales, "int2_channel");
  REQUIRE(at::where(held, shipped - latent.detach(), at::zeros_like(latent)).abs().max().item<double>() == 0);
}

TEST_CASE("damping draws weights to the middle of their cells") {
  double distance[2] = {0, 0};
  for (const int damped : {0, 1}) {
    Life life(options_with([&](Options& o) { o.oscillation.damping = damped * 10.0; }));
    life.run([&](const StepReport& report) {
      if (report.step == 12) distance[damped] = report.distance_to_grid;
      return true;
    });
  }
  REQUIRE(distance[1] < 0.9 * distance[0]);
}

TEST_CASE("the proximal step draws weights to the grid as its formula says") {
  const ScratchFolder folder;
  const Options options = options_with([](Options& o) {
    o.prox = {1, 6};
    o.save_every = 1;
    o.telemetry_every = 0;
  });
  Life life(options, folder / "run");
  std::vector<double> rounded;  // what forward sees against the levels
  REQUIRE(life.run([&](const StepReport& report) {
    if (report.step == 1) return true;
    const at::Tensor z = tensor_of(folder / "run", "prox/head.weight").to(at::kDouble);
    const at::Tensor seen = tensor_of(folder / "run", "latent/head.weight").to(at::kDouble);
    const at::Tensor scale =
        tensor_of(folder / "run", "scales/head.weight_scales").to(at::kDouble).view({-1, 1});
    const double x = static_cast<double>(report.step - 1) / 12;
    const auto sigmoid = [](double at) { return 1 / (1 + std::exp(6 * (at - 0.5))); };
    const double rho = (sigmoid(x) - sigmoid(1)) / (sigmoid(0) - sigmoid(1));
    // Levels are the integers -2 ... 1 times the scale.
    const at::Tensor unit = (z / scale).clamp(-2, 1);
    const at::Tensor below = unit.floor().clamp_max(0), middle = below + 0.5;
    const at::Tensor drawn = (middle + (unit - middle) / rho).clamp(below, below + 1) * scale;
    // float32 numbers up to 2, divided by rho.
    REQUIRE((drawn - seen).abs().max().item<double>() < 2e-6 / rho);
    rounded.push_back(((seen / scale).round() - seen / scale).abs().mean().item<double>());
    return true;
  }) == Outcome::kFinished);
  REQUIRE(rounded.size() == 11);
  for (std::size_t i = 1; i < rounded.size(); ++i) REQUIRE(rounded[i] < rounded[i - 1]);
  REQUIRE(rounded.back() < 0.05);
  REQUIRE(life.quantizer(3).blend() == 1);
}
