// What changes over the steps of a run: what each schedule does, and that an interrupted run ends in the same
// bits.

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <cstring>
#include <map>

#include "catch.hpp"
#include "qat/io/safetensors.hpp"
#include "qat/ops/ops.hpp"
#include "qat/train/trainer.hpp"
#include "train/scratch_folder.hpp"
#include "train/tiny_blocks.hpp"
#include "train/tiny_run.hpp"

namespace {

using qat::Quantizer;
using qat::train::Options;
using qat::train::Outcome;
using qat::train::StepReport;
using qat::train::Trainer;
using Change = std::function<void(Options&)>;
using Watch = std::function<bool(const StepReport&)>;

Options options_with(const Change& change) {
  Options options = tiny_options();
  options.scale_learning_rate = 2e-2;
  change(options);
  return options;
}

/// A process's life: its own model, and a trainer on the run folder.
struct Life {
  explicit Life(const Options& options, const std::string& folder = "",
                const qat::eval::LogitsFunction& student = nullptr)
      : trainer(*setup.model, student ? student : setup.student_function(), setup.teacher_function(),
                tiny_data(), options, folder) {}

  Outcome run(const Watch& watch = nullptr) {
    trainer.set_progress(watch);
    return trainer.run();
  }
  /// Of blocks 0 to 2 and of the head, 3; slot 0 is the embedding, which stays float.
  Quantizer& quantizer(std::size_t place) { return *setup.model->quantizers()[place + 1]; }

  BlocksSetup setup;
  Trainer trainer;
};

/// All that trains, in one row.
at::Tensor everything(BlocksSetup& setup) {
  std::vector<at::Tensor> parts;
  for (const at::Tensor& parameter : setup.student->parameters()) {
    parts.push_back(parameter.detach().reshape({-1}));
  }
  for (const auto& scale : setup.model->scale_parameters())
    parts.push_back(scale.value.detach().reshape({-1}));
  return at::cat(parts);
}

at::Tensor tensor_of(const std::string& folder, const std::string& key) {
  const qat::io::SafetensorsFile file(folder + "/state.safetensors");
  const auto& saved = file.at(key);
  const auto type = saved.dtype == qat::io::Dtype::kF32 ? at::kFloat : at::kChar;
  at::Tensor tensor = at::empty(saved.shape, at::TensorOptions(type));
  std::memcpy(tensor.mutable_data_ptr(), saved.data.data(), saved.data.size());
  return tensor;
}

at::Tensor codes_of(Quantizer& quantizer, const at::Tensor& latent) {
  return std::get<0>(quantizer.quantize(latent.detach()));
}

}  // namespace

TEST_CASE("with any schedule, a run interrupted again and again ends in the same bits") {
  const std::map<std::string, Change> changes = {
      {"learned scales", [](Options&) {}},
      {"held scales", [](Options& o) { o.scale_learning_rate = 0; }},
      {"ema", [](Options& o) { o.ema = 0.8; }},
      {"delay and blend",
       [](Options& o) {
         o.delay = 0.25;
         o.blend = 0.5;
       }},
      {"progressive",
       [](Options& o) {
         o.progressive = {{"int8_channel", 0.25}, {"int4_channel", 0.7}};
         o.ema = 0.9;
       }},
      {"unfreeze",
       [](Options& o) {
         o.unfreeze = {"last", 0.6};
         o.progressive = {{"int4_channel", 0.4}};
       }},
      {"oscillation",
       [](Options& o) {
         o.oscillation = {0.3, 0.2, 1e-3};
         o.learning_rate = 5e-2;
       }},
      {"prox",
       [](Options& o) {
         o.prox = {0.7, 8};
         o.ema = 0.5;
       }},
      {"prox to the end", [](Options& o) { o.prox = {1, 10}; }},
  };
  for (const auto& [name, change] : changes) {
    CAPTURE(name);
    const ScratchFolder folder;
    const Options options = options_with(change);
    Life whole(options, folder / "whole");
    REQUIRE(whole.run() == Outcome::kFinished);
    const std::string expected = read_file(folder / "whole/state.safetensors");
    for (const int64_t stop : {1, 3, 6, 8, 11}) {
      Life part(options, folder / "parts");
      if (stop > 1) part.trainer.resume();
      REQUIRE(part.run([&](const StepReport& report) { return report.step < stop; }) ==
              Outcome::kInterrupted);
      REQUIRE(part.trainer.step() == stop);
    }
    Life last(options, folder / "parts");
    last.trainer.resume();
    REQUIRE(last.run() == Outcome::kFinished);
    REQUIRE(read_file(folder / "parts/state.safetensors") == expected);
    REQUIRE(everything(last.setup).equal(everything(whole.setup)));
    Life finished(options, folder / "parts");
    finished.trainer.resume();
    REQUIRE(finished.run() == Outcome::kFinished);
    REQUIRE(everything(finished.setup).equal(everything(whole.setup)));
    REQUIRE(finished.trainer.warnings() == whole.trainer.warnings());
  }
}

TEST_CASE("the average is the mean of the first steps, then exponential, and what is evaluated and shipped") {
  const ScratchFolder folder;
  Options options = options_with([](Options& o) {
    o.ema = 0.75;
    o.eval_every = 12;
  });
  Life life(options, folder / "run");
  const at::Tensor held_out = tiny_tokens(100);
  life.trainer.set_evaluation(held_out);
  at::Tensor expected, last;
  double kl = 0;
  REQUIRE(life.run([&](const StepReport& report) {
    last = everything(life.setup).to(at::kDouble);
    const double weight = std::max(0.25, 1.0 / static_cast<double>(report.step));
    expected = report.step == 1 ? last : expected + weight * (last - expected);
    if (!report.evaluation.empty()) kl = report.evaluation[1].kl;
    return true;
  }) == Outcome::kFinished);
  const at::Tensor shipped = everything(life.setup).to(at::kDouble);
  // A dozen float32 roundings of numbers up to 4.
  REQUIRE((shipped - expected).abs().max().item<double>() < 1e-5);
  REQUIRE((shipped - last).abs().max().item<double>() > 1e-3);
  REQUIRE(tensor_of(folder / "run", "average/head.weight").equal(life.setup.student->head->weight.detach()));
  REQUIRE_FALSE(
      tensor_of(folder / "run", "latent/head.weight").equal(life.setup.student->head->weight.detach()));
  const auto scope = life.setup.model->quantized();
  const auto scores =
      qat::eval::compare(life.setup.teacher_function(), {life.setup.student_function()}, held_out);
  REQUIRE(scores[1].kl == kl);
}

TEST_CASE("rounding is delayed, then blended in") {
  const Options options = options_with([](Options& o) {
    o.delay = 0.25;  // 3 of 12 steps
    o.blend = 0.5;   // 6 more
    o.telemetry_every = 0;
  });
  std::vector<double> blends;
  BlocksSetup* setup = nullptr;
  Life life(options, "", [&](const at::Tensor& tokens) {
    blends.push_back(setup->model->quantizers().back()->blend());
    return setup->student->forward(tokens);
  });
  setup = &life.setup;
  life.run();
  const double sixth = 1.0 / 6;
  const std::vector<double> expected = {0,         0,         0,         sixth,     2 * sixth, 3 * sixth,
                                        4 * sixth, 5 * sixth, 6 * sixth, 6 * sixth, 6 * sixth, 6 * sixth};
  REQUIRE(blends.size() == expected.size());
  for (std::size_t i = 0; i < blends.size(); ++i) REQUIRE(blends[i] == Approx(expected[i]));
  const Options stopped = options_with([](Options& o) { o.delay = 0.9; });
  BlocksSetup other;
  {
    Trainer trainer(*other.model, other.student_function(), other.teacher_function(), tiny_data(), stopped,
                    "");
    trainer.set_progress([](const StepReport&) { return false; });
    trainer.run();
    REQUIRE(other.model->quantizers().back()->blend() == 0);
  }
  REQUIRE(other.model->quantizers().back()->blend() == 1);  // as it was before
}

TEST_CASE("measurements see the model as it ships, whatever is blended") {
  const Options options = options_with([](Options& o) { o.delay = 0.9; });
  Life life(options);
  life.run([&](const StepReport& report) {
    // The float student has not moved far in a few steps; rounded to two bits it is far from its teacher.
    if (report.step == 4) REQUIRE(report.probe_kl > 0.5 * report.probe_kl_start);
    if (report.step == 1) REQUIRE(report.loss == 0);  // not rounded, the student is its teacher
    return true;
  });
}

TEST_CASE("weights train in more bits first, in the grids of the stages") {
  Options options = options_with([](Options& o) {
    o.progressive = {{"int8_channel", 0.25}, {"int4_channel", 0.5}};
    o.telemetry_every = 2;
  });
  Life life(options);
  std::vector<std::string> grids;
  life.run([&](const StepReport& report) {
    grids.push_back(life.quantizer(0).training_grid());
    if (report.step % 2 == 0) {
      const std::string used = grids.back().empty() ? "int2_channel" : grids.back();
      REQUIRE(report.dead_codes.size() == 1);
      REQUIRE(report.dead_codes.begin()->first == used);
      // Codes of different grids are not compared: at step 8, those of two bits are one step old.
      if (report.step == 8) REQUIRE(report.flip_rate < 0.3);
    }
    return true;
  });
  const std::vector<std::string> eights(3, "int8_channel"), fours(3, "int4_channel"), twos(6, "");
  std::vector<std::string> expected = eights;
  expected.insert(expected.end(), fours.begin(), fours.end());
  expected.insert(expected.end(), twos.begin(), twos.end());
  REQUIRE(grids == expected);

  options.progressive = {{"q8_0", 0.5}};  // blocks of 32, as wide as the layers
  REQUIRE(Life(options).run() == Outcome::kFinished);
  options.progressive = {{"q6_k", 0.5}};
  REQUIRE_THAT(message<qat::ArgumentError>([&] { Life life_of_k(options); }),
               Catch::Contains("progressive[0]") && Catch::Contains("q6_k") && Catch::Contains("32"));
  options.progressive = {{"int2_channel", 0.5}};  // no more bits than what ships
  Life same(options);
  same.run([&](const StepReport&) {
    REQUIRE(same.quantizer(0).training_grid().empty());
    return true;
  });
}

TEST_CASE("blocks begin to train one after another, from either end") {
  for (const bool from_last : {true, false}) {
    const Options options = options_with([&](Options& o) {
      o.unfreeze = {from_last ? "last" : "first", 0.5};
      o.telemetry_every = 0;
    });
    Life life(options);
    const auto snapshot = [&] {
      std::vector<at::Tensor> values;
      for (std::size_t i = 0; i < 3; ++i) values.push_back(life.setup.student->weight(i).detach().clone());
      for (std::size_t i = 0; i < 3; ++i) values.push_back(life.quantizer(i).scales().detach().clone());
      values.push_back(life.setup.student->head->weight.detach().clone());
      return values;
    };
    auto before = snapshot();
    life.run([&](const StepReport& report) {
      const auto after = snapshot();
      for (std::size_t i = 0; i < 3; ++i) {
        const std::size_t rank = from_last ? 2 - i : i;
        const bool trains = report.step > static_cast<int64_t>(3 * rank);  // half of 12 steps, in 2 parts
        CAPTURE(report.step, i);
        REQUIRE(after[i].equal(before[i]) != trains);
        REQUIRE(after[3 + i].equal(before[3 + i]) != trains);
      }
      REQUIRE_FALSE(after[6].equal(before[6]));
      before = after;
      return true;
    });
    REQUIRE(life.setup.student->weight(0).requires_grad());
  }
}

TEST_CASE("a block that begins late takes a first step of full size") {
  const Options options = options_with([](Options& o) {
    o.unfreeze = {"first", 0.5};
    o.warmup = 0;
    o.final_learning_rate = 1;
    o.telemetry_every = 0;
  });
  Life life(options);
  at::Tensor before;
  life.run([&](const StepReport& report) {
    const at::Tensor now = life.setup.student->weight(2).detach().clone();
    // Adam's first step is the rate times the gradient's sign, where that is far above epsilon.
    if (report.step == 7) REQUIRE((now - before).abs().max().item<double>() == Approx(1e-2).epsilon(1e-3));
    before = now;
    return true;
  });
}

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
