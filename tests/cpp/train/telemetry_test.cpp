// What a run says about itself, step by step.

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "catch.hpp"
#include "qat/ops/ops.hpp"
#include "qat/train/trainer.hpp"
#include "train/scratch_folder.hpp"
#include "train/tiny_run.hpp"

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
  Options options = tiny_options();
  options.learning_rate = 3e-2;
  options.eval_every = 6;
  at::Tensor up = codes_of(setup.student->up), head = codes_of(setup.student->head);
  Trainer trainer(*setup.model, setup.student_function(), setup.teacher_function(), tiny_data(), options,
                  folder / "run");
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

TEST_CASE("telemetry counts turns, clipped weights, unused codes and the drift of scales") {
  TinySetup setup(0, tiny_learned_policy());
  Options options = tiny_options();
  options.learning_rate = 3e-2;
  options.scale_learning_rate = 5e-2;
  options.telemetry_every = 3;
  const at::Tensor up = setup.student->up->weight, head = setup.student->head->weight;
  const auto scales = [&] {
    std::vector<at::Tensor> values;
    for (const auto& scale : setup.model->scale_parameters()) values.push_back(scale.value.detach().clone());
    return values;
  };
  const auto codes = [&] {
    return std::vector<at::Tensor>{
        std::get<0>(setup.model->quantizers()[1]->quantize(up.detach())),
        std::get<0>(setup.model->quantizers()[2]->quantize(head.detach())),
    };
  };
  const auto start = scales();
  auto before = codes();
  std::vector<at::Tensor> direction = {at::zeros_like(before[0]), at::zeros_like(before[1])};
  Trainer trainer(*setup.model, setup.student_function(), setup.teacher_function(), tiny_data(), options, "");
  double turns_seen = 0;
  trainer.set_progress([&](const StepReport& report) {
    REQUIRE((report.oscillation >= 0) == (report.step % 3 == 0));
    if (report.step % 3 != 0) return true;
    const auto now = codes();
    double turns = 0, weights = 0, clipped = 0, unused = 0, drift = 0, count = 0;
    const at::Tensor latents[] = {up.detach(), head.detach()};
    for (std::size_t i = 0; i < 2; ++i) {
      const at::Tensor move = (now[i] - before[i]).sign();
      turns += static_cast<double>((move * direction[i]).eq(-1).sum().item<int64_t>());
      direction[i] = at::where(move.ne(0), move, direction[i]);
      weights += static_cast<double>(now[i].numel());
      const at::Tensor unit = latents[i].to(at::kDouble) / scales()[i].to(at::kDouble).view({-1, 1});
      clipped += static_cast<double>(unit.lt(-2).logical_or(unit.gt(1)).sum().item<int64_t>());
      for (int code = -2; code <= 1; ++code) unused += now[i].eq(code).any().item<bool>() ? 0 : 1;
      const at::Tensor change =
          (scales()[i] - start[i]).to(at::kDouble) / start[i].abs().mean().item<double>();
      drift += change.square().sum().item<double>();
      count += static_cast<double>(change.numel());
    }
    before = now;
    turns_seen += turns;
    REQUIRE(report.oscillation == turns / weights);
    // The grid widens its borders by 2^-20 of themselves, in which a weight may fall.
    REQUIRE(std::abs(report.clip_rate - clipped / weights) <= 1 / weights);
    REQUIRE(report.clip_rate > 0);
    REQUIRE(report.dead_codes == std::map<std::string, double>{{"int2_channel", unused / 8}});
    REQUIRE(report.scale_drift == Approx(std::sqrt(drift / count)).epsilon(1e-5));
    REQUIRE(report.scale_drift > 0.01);
    return true;
  });
  trainer.run();
  REQUIRE(turns_seen > 0);
}

TEST_CASE("the probe measures what would ship on the first batch that is not trained on") {
  TinySetup setup;
  const Options options = tiny_options();
  const at::Tensor tokens = tiny_data().batch(options.steps, 2, 8, 0);
  const auto kl = [&] {
    const c10::NoGradGuard no_grad;
    const auto scope = setup.model->quantized();
    return qat::train::objective_loss(setup.student->forward(tokens), setup.teacher->forward(tokens), tokens,
                                      {})
        .item<double>();
  };
  const double start = kl();
  Trainer trainer(*setup.model, setup.student_function(), setup.teacher_function(), tiny_data(), options, "");
  trainer.set_progress([&](const StepReport& report) {
    REQUIRE((report.probe_kl >= 0) == (report.step % 4 == 0));
    if (report.step % 4 != 0) return true;
    REQUIRE(report.probe_kl == kl());
    REQUIRE(report.probe_kl_start == start);
    return true;
  });
  trainer.run();
  REQUIRE(kl() < start);
  REQUIRE(trainer.warnings().empty());
}

TEST_CASE("a run that ends worse than it began is warned about, with a cause") {
  const auto warning = [](const std::function<void(Options&)>& change, int64_t text = 400) -> std::string {
    TinySetup setup(0, tiny_learned_policy());
    Options options = tiny_options();
    change(options);
    Trainer trainer(*setup.model, setup.student_function(), setup.teacher_function(), tiny_data(text),
                    options, "");
    trainer.run();
    const auto warnings = trainer.warnings();
    REQUIRE(warnings.size() <= 1);
    return warnings.empty() ? "" : warnings[0];
  };
  REQUIRE(warning([](Options&) {}).empty());
  const std::string wild = warning([](Options& o) { o.learning_rate = 3; });
  REQUIRE_THAT(wild, Catch::Contains("training made the model worse") &&
                         Catch::Contains("the learning rate is too high"));
  REQUIRE_THAT(warning([](Options& o) { o.scale_learning_rate = 2; }),
               Catch::Contains("scale_learning_rate is too high"));
  REQUIRE_THAT(warning([](Options& o) { o.learning_rate = 3; }, 30), Catch::Contains("it is too short"));
  // Without measurements there is nothing to compare.
  REQUIRE(warning([](Options& o) {
            o.learning_rate = 3;
            o.telemetry_every = 0;
          }).empty());
  REQUIRE(warning([](Options& o) {
            o.learning_rate = 3;
            o.objective = {0, 1, 1};
          }).empty());
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
  report.probe_kl_start = 0.5;
  report.dead_codes = {{"q4_0", 0.25}};
  report.evaluation.resize(2);
  report.evaluation[1].kl = 0.25;
  REQUIRE_THAT(qat::train::to_json(report),
               Catch::Contains(R"("flip_rate":0.0)") && Catch::Contains(R"("probe_kl_start":0.5)") &&
                   Catch::Contains(R"("dead_codes":{"q4_0":0.25})") && Catch::Contains(R"("student":{)") &&
                   Catch::Contains(R"("kl":0.25)") && !Catch::Contains("\n"));
}
