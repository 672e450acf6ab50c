// Training with a teacher from disk, and in halves: the same run by other ways.

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/train/cache_check.hpp"
#include "qat/train/trainer.hpp"
#include "train/scratch_folder.hpp"
#include "train/tiny_run.hpp"

namespace {

using qat::train::CachePlan;
using qat::train::in_halves;
using qat::train::Options;
using qat::train::Outcome;
using qat::train::StepReport;
using qat::train::TeacherCache;
using qat::train::TokenData;
using qat::train::Trainer;

CachePlan plan(int64_t top_k, const Options& options = tiny_options()) {
  return plan_teacher_cache(tiny_data(), options, top_k, 77);
}

TeacherCache cached(const std::string& path, int64_t top_k = 4, const Options& options = tiny_options()) {
  const TinySetup setup;
  REQUIRE(TeacherCache::build(path, plan(top_k, options), in_halves(setup.teacher), tiny_data(), options));
  return TeacherCache::open(path, plan(top_k, options));
}

/// A process's life: its own model, and a trainer with a cached teacher on the run folder.
struct Life {
  Life(const TeacherCache& cache, const std::string& folder, const Options& options = tiny_options())
      : setup(0.1), trainer(*setup.model, in_halves(setup.student), cache, tiny_data(), options, folder) {}
  TinySetup setup;
  Trainer trainer;
};

std::vector<double> losses(Trainer& trainer) {
  std::vector<double> values;
  trainer.set_progress([&](const StepReport& report) {
    values.push_back(report.loss);
    return true;
  });
  REQUIRE(trainer.run() == Outcome::kFinished);
  return values;
}

}  // namespace

TEST_CASE("a student in halves trains as one in a piece does, whatever the chunk") {
  Options options = tiny_options();
  options.objective = {0.7, 0.3, 1.5};
  TinySetup whole;
  Trainer reference(*whole.model, whole.student_function(), whole.teacher_function(), tiny_data(), options,
                    "");
  const std::vector<double> expected = losses(reference);
  for (const int64_t chunk : {0, 3}) {
    options.loss_chunk = chunk;
    TinySetup halves;
    Trainer trainer(*halves.model, in_halves(halves.student), in_halves(halves.teacher), tiny_data(), options,
                    "");
    const std::vector<double> got = losses(trainer);
    // float32 products of other heights round otherwise, 2^-24 each; Adam amplifies that over 12 steps.
    for (std::size_t i = 0; i < got.size(); ++i) REQUIRE(got[i] == Approx(expected[i]).epsilon(1e-3));
  }
}

TEST_CASE("with all outcomes but one, a cached teacher is the live one up to half precision") {
  const ScratchFolder folder;
  TinySetup live;
  Trainer reference(*live.model, in_halves(live.student), in_halves(live.teacher), tiny_data(),
                    tiny_options(), "");
  const std::vector<double> expected = losses(reference);
  const TeacherCache cache = cached(folder / "all", kTinyVocabulary - 1);
  TinySetup setup;
  Trainer trainer(*setup.model, in_halves(setup.student), cache, tiny_data(), tiny_options(), "");
  const std::vector<double> got = losses(trainer);
  // A log-probability l is off by l / 2048 at most, and those that weigh are near 0.
  REQUIRE(got.front() == Approx(expected.front()).epsilon(1e-3));
  // Afterwards single 2-bit codes flip earlier or later, and Adam's first steps are as long as they can be.
  for (std::size_t i = 0; i < got.size(); ++i) REQUIRE(got[i] == Approx(expected[i]).epsilon(0.1));
  REQUIRE(got.back() < 0.9 * got.front());
}

TEST_CASE("a student in one piece can use a cached teacher, too") {
  const ScratchFolder folder;
  const TeacherCache cache = cached(folder / "top");
  TinySetup halves, whole;
  Trainer one(*halves.model, in_halves(halves.student), cache, tiny_data(), tiny_options(), "");
  Trainer two(*whole.model, whole.student_function(), cache, tiny_data(), tiny_options(), "");
  const auto a = losses(one), b = losses(two);
  for (std::size_t i = 0; i < a.size(); ++i) REQUIRE(a[i] == Approx(b[i]).epsilon(1e-3));  // as above
}

TEST_CASE("with a cached teacher, a resumed run ends in the same bytes") {
  const ScratchFolder folder;
  const TeacherCache cache = cached(folder / "cache");
  Life whole(cache, folder / "whole");
  REQUIRE(whole.trainer.run() == Outcome::kFinished);
  const std::string expected = read_file(folder / "whole/state.safetensors");
  for (const int64_t stop : {3, 7}) {
    const std::string path = folder / ("stopped" + std::to_string(stop));
    {
      Life life(cache, path);
      life.trainer.set_progress([&](const StepReport& report) { return report.step < stop; });
      REQUIRE(life.trainer.run() == Outcome::kInterrupted);
    }
    // Another process would open the file anew; its records may lie in another order.
    Life life(TeacherCache::open(folder / "cache", plan(4)), path);
    life.trainer.resume();
    REQUIRE(life.trainer.step() == stop);
    REQUIRE(life.trainer.run() == Outcome::kFinished);
    REQUIRE(read_file(path + "/state.safetensors") == expected);
  }
  REQUIRE_THAT(read_file(folder / "whole/run.json"),
               Catch::Contains(R"("teacher":{"top_k":4,"fingerprint":"000000000000004d"})"));
}

TEST_CASE("a run goes on with the teacher that it began with") {
  const ScratchFolder folder;
  const std::string path = folder / "run";
  const TeacherCache four = cached(folder / "four"), five = cached(folder / "five", 5);
  Life(four, path).trainer.run();
  REQUIRE_THAT(message<qat::FileError>([&] { Life(five, path).trainer.resume(); }),
               Catch::Contains("another run: teacher") && Catch::Contains("\"top_k\":5"));
  TinySetup live(0.1);
  Trainer trainer(*live.model, in_halves(live.student), in_halves(live.teacher), tiny_data(), tiny_options(),
                  path);
  REQUIRE_THAT(message<qat::FileError>([&] { trainer.resume(); }),
               Catch::Contains("another run: teacher: expected null"));
}

TEST_CASE("a trainer refuses a cache for something else") {
  const ScratchFolder folder;
  const TeacherCache cache = cached(folder / "cache");
  const auto refusal = [&](const std::function<void(Options&)>& change, const TokenData& data = tiny_data()) {
    Options options = tiny_options();
    change(options);
    TinySetup setup;
    return message<qat::ArgumentError>(
        [&] { Trainer(*setup.model, in_halves(setup.student), cache, data, options, ""); });
  };
  REQUIRE(refusal([](Options&) {}) == "accepted");
  REQUIRE(refusal([](Options& o) { o.steps = 3; }) == "accepted");
  REQUIRE_THAT(refusal([](Options& o) { o.steps = 13; }), Catch::Contains("the answer to window"));
  REQUIRE_THAT(refusal([](Options& o) { o.seed = 1; }), Catch::Contains("the answer to window"));
  REQUIRE_THAT(refusal([](Options& o) { o.sequence_length = 9; }), Catch::Contains("windows of 9 tokens"));
  REQUIRE_THAT(refusal([](Options& o) { o.objective.temperature = 2; }), Catch::Contains("temperature"));
  REQUIRE_THAT(refusal([](Options& o) { o.objective = {0, 1, 1}; }),
               Catch::Contains("compares with a teacher"));
  REQUIRE_THAT(refusal([](Options&) {}, tiny_data(401)), Catch::Contains("this text"));
}

TEST_CASE("without a live teacher, an evaluation scores the student alone") {
  const ScratchFolder folder;
  Options options = tiny_options();
  options.eval_every = 6;
  const TeacherCache cache = cached(folder / "cache");
  Life life(cache, "", options);
  qat::eval::Options settings;
  settings.window = 10;
  life.trainer.set_evaluation(tiny_tokens(50), settings);
  std::vector<std::size_t> scores;
  life.trainer.set_progress([&](const StepReport& report) {
    scores.push_back(report.evaluation.size());
    return true;
  });
  life.trainer.run();
  REQUIRE(scores == std::vector<std::size_t>({0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1}));
}

TEST_CASE("the check of a cache measures loss and gradient against the live teacher") {
  const ScratchFolder folder;
  TinySetup setup;
  const auto check = [&](int64_t top_k) {
    const TeacherCache cache = cached(folder / std::to_string(top_k), top_k);
    return check_teacher_cache(*setup.model, in_halves(setup.student), in_halves(setup.teacher), cache,
                               tiny_data(), tiny_options(), 3);
  };
  const at::Tensor before = setup.student->head->weight.detach().clone();
  const auto one = check(1), four = check(4), most = check(16);
  REQUIRE(one.tokens == 3 * 2 * 7);
  double live = 0;
  for (int64_t index = 0; index < 3; ++index) {
    const c10::NoGradGuard no_grad;
    const auto scope = setup.model->quantized();
    const at::Tensor tokens = tiny_data().batch(index, 2, 8, 0);
    live +=
        qat::train::objective_loss(setup.student->forward(tokens), setup.teacher->forward(tokens), tokens, {})
            .item<double>() /
        3;
  }
  REQUIRE(one.live == Approx(live).epsilon(1e-5));  // float32
  REQUIRE(four.live == one.live);
  // Fewer merged outcomes, a tighter bound.
  REQUIRE(one.cached < four.cached);
  REQUIRE(four.cached < four.live);
  REQUIRE(most.cached == Approx(live).epsilon(0.01));  // half precision
  REQUIRE(one.cosine < four.cosine);
  REQUIRE(four.cosine < most.cosine);
  REQUIRE(most.cosine > 0.9999);
  REQUIRE(most.cosine <= 1 + 1e-12);
  REQUIRE(setup.student->head->weight.equal(before));
  REQUIRE_FALSE(setup.student->head->weight.grad().defined());
}

TEST_CASE("buffers of every type that a file has are resumed, int16 among them") {
  const ScratchFolder folder;
  for (const at::ScalarType type : {at::kShort, at::kByte, at::kDouble, at::kBool}) {
    const std::string path = folder / c10::toString(type);
    TinySetup first;
    first.student->register_buffer("state", at::ones({3}, type));
    Trainer(*first.model, first.student_function(), first.teacher_function(), tiny_data(), tiny_options(),
            path)
        .run();
    TinySetup second;
    const at::Tensor buffer = second.student->register_buffer("state", at::zeros({3}, type));
    Trainer trainer(*second.model, second.student_function(), second.teacher_function(), tiny_data(),
                    tiny_options(), path);
    trainer.resume();
    REQUIRE(buffer.eq(1).all().item<bool>());
  }
  TinySetup setup;
  setup.student->register_buffer("wave", at::ones({1}, at::kComplexFloat));
  Trainer trainer(*setup.model, setup.student_function(), setup.teacher_function(), tiny_data(),
                  tiny_options(), folder / "complex");
  REQUIRE_THAT(message<qat::UnsupportedError>([&] { trainer.run(); }), Catch::Contains("buffer/wave"));
}
