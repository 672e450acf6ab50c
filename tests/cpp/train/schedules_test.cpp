// What changes over the steps of a run: what each schedule does, and that an interrupted run ends in the same
// bits.

#include <algorithm>
#include <map>

#include "catch.hpp"
#include "train/schedule_run.hpp"

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
