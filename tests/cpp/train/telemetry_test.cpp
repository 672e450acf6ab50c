// What a run says about itself, step by step.

#include <ATen/TensorOperators.h>

#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "catch.hpp"
#include "qat/ops/ops.hpp"
#include "qat/train/trainer.hpp"
#include "train/scratch_folder.hpp"
#include "train/tiny_model.hpp"

namespace {

using qat::train::Options;
using qat::train::StepReport;
using qat::train::TokenData;
using qat::train::Trainer;

at::Tensor codes_of(const torch::nn::Linear& layer) {
  return std::get<0>(qat::ops::quantize(layer->weight.detach(), "int2_channel"));
}

}  // namespace

TEST_CASE("telemetry measures flips and distance, and evaluation scores teacher and student") {
  TinySetup setup;
  const ScratchFolder folder;
  Options options;
  options.steps = 12;
  options.sequence_length = 8;
  options.learning_rate = 3e-2;
  options.compute_dtype = "float32";
  options.telemetry_every = 4;
  options.eval_every = 6;
  at::Tensor up = codes_of(setup.student->up), head = codes_of(setup.student->head);
  Trainer trainer(*setup.model, setup.student_function(), setup.teacher_function(),
                  TokenData::from_tensor(tiny_tokens(400), kTinyVocabulary), options, folder / "run");
  const at::Tensor held_out = tiny_tokens(500).slice(0, 400);
  qat::eval::Options evaluation;
  evaluation.window = 16;
  trainer.set_evaluation(held_out, evaluation);
  std::vector<StepReport> reports;
  trainer.set_progress([&](const StepReport& report) {
    reports.push_back(report);
    if (report.step % 4 != 0) return true;
    const at::Tensor new_up = codes_of(setup.student->up), new_head = codes_of(setup.student->head);
    const auto changed = new_up.ne(up).sum().item<int64_t>() + new_head.ne(head).sum().item<int64_t>();
    const auto total = static_cast<double>(up.numel() + head.numel());
    REQUIRE(report.flip_rate == static_cast<double>(changed) / total);
    REQUIRE(report.flip_rate > 0);
    double error = 0, power = 0;
    for (const at::Tensor& w : {setup.student->up->weight.detach(), setup.student->head->weight.detach()}) {
      error += (qat::ops::fake_quantize(w, "int2_channel") - w).to(at::kDouble).square().sum().item<double>();
      power += w.to(at::kDouble).square().sum().item<double>();
    }
    REQUIRE(report.distance_to_grid == Approx(std::sqrt(error / power)).epsilon(1e-5));
    up = new_up;
    head = new_head;
    return true;
  });
  trainer.run();
  for (const StepReport& report : reports) {
    REQUIRE((report.flip_rate >= 0) == (report.step % 4 == 0));
    REQUIRE(report.evaluation.size() == (report.step % 6 == 0 ? 2 : 0));
    REQUIRE(report.tokens_per_second > 0);
    REQUIRE(report.seconds_left >= 0);
  }
  REQUIRE(reports.back().seconds_left == 0);
  const auto scope = setup.model->quantized();
  const auto scores =
      qat::eval::compare(setup.teacher_function(), {setup.student_function()}, held_out, evaluation);
  REQUIRE(reports.back().evaluation[1].kl == scores[1].kl);
  REQUIRE(reports.back().evaluation[0].nll == scores[0].nll);
  REQUIRE(reports.back().evaluation[1].kl < reports[5].evaluation[1].kl);

  std::ifstream lines(folder / "run/telemetry.jsonl");
  std::string line;
  for (const StepReport& report : reports) {
    REQUIRE(std::getline(lines, line));
    REQUIRE(line == qat::train::to_json(report));
  }
  REQUIRE_FALSE(std::getline(lines, line));
}

TEST_CASE("a step report is one line of JSON without what was not measured") {
  StepReport report;
  report.step = 3;
  report.steps = 10;
  report.loss = 0.5;
  REQUIRE(
      qat::train::to_json(report) ==
      R"({"step":3,"steps":10,"loss":0.5,"learning_rate":0.0,"gradient_norm":0.0,"tokens_per_second":0.0,)"
      R"("seconds_left":0.0})");
  report.flip_rate = 0;
  report.evaluation.resize(2);
  report.evaluation[1].kl = 0.25;
  REQUIRE_THAT(qat::train::to_json(report), Catch::Contains(R"("flip_rate":0.0)") &&
                                                Catch::Contains(R"("student":{)") &&
                                                Catch::Contains(R"("kl":0.25)") && !Catch::Contains("\n"));
}
