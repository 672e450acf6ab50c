// A run that was interrupted, in any way, ends in the same bytes as one that was not.

#include <ATen/TensorOperators.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <sstream>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/train/trainer.hpp"
#include "train/scratch_folder.hpp"
#include "train/tiny_run.hpp"

namespace {

using qat::train::Options;
using qat::train::Outcome;
using qat::train::StepReport;
using qat::train::TokenData;
using qat::train::Trainer;

constexpr const char* kFolderVariable = "QAT_TEST_RUN_FOLDER";

/// A process's life: its own model, and a trainer on the run folder.
struct Life {
  explicit Life(const std::string& folder, const Options& options = tiny_options(), int64_t text = 400)
      : setup(0.1),
        trainer(*setup.model, setup.student_function(), setup.teacher_function(), tiny_data(text), options,
                folder) {}
  TinySetup setup;
  Trainer trainer;
};

/// The state an uninterrupted run ends in.
std::string uninterrupted(const std::string& folder) {
  Life life(folder);
  REQUIRE(life.trainer.run() == Outcome::kFinished);
  return read_file(folder + "/state.safetensors");
}

/// telemetry.jsonl without what depends on the clock.
std::vector<std::string> steps_of(const std::string& folder) {
  std::vector<std::string> lines;
  std::istringstream in(read_file(folder + "/telemetry.jsonl"));
  for (std::string line; std::getline(in, line);) {
    const auto from = line.find(",\"tokens_per_second\""), seconds = line.find("\"seconds_left\"");
    const auto to = line.find_first_of(",}", seconds);
    lines.push_back(line.substr(0, from) + line.substr(to));
  }
  return lines;
}

}  // namespace

TEST_CASE("the life of a killed run", "[.killed]") {
  Life life(std::getenv(kFolderVariable));
  life.trainer.set_progress([](const StepReport& report) {
    if (report.step == 8) std::raise(SIGKILL);
    return true;
  });
  life.trainer.run();
}

TEST_CASE("killed after a step, resumed, the run ends in the same bytes") {
  const ScratchFolder folder;
  const std::string expected = uninterrupted(folder / "whole");
  const std::string killed = folder / "killed";
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    // A process of its own: threads do not survive a fork.
    setenv(kFolderVariable, killed.c_str(), 1);
    execl("/proc/self/exe", "test_train", "[.killed]", nullptr);
    _exit(1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFSIGNALED(status));
  REQUIRE(steps_of(killed).size() == 8);

  Life life(killed);
  life.trainer.resume();
  REQUIRE(life.trainer.step() == 5);
  REQUIRE(steps_of(killed).size() == 5);
  REQUIRE(life.trainer.run() == Outcome::kFinished);
  REQUIRE(read_file(killed + "/state.safetensors") == expected);
  REQUIRE(steps_of(killed) == steps_of(folder / "whole"));
  REQUIRE(steps_of(killed).size() == 12);
}

TEST_CASE("stopped by request or by progress, resumed, the run ends in the same bytes") {
  const ScratchFolder folder;
  const std::string expected = uninterrupted(folder / "whole");
  const std::string stopped = folder / "stopped";
  {
    Life life(stopped);
    life.trainer.set_progress([&](const StepReport& report) {
      if (report.step == 3) life.trainer.request_stop();
      return true;
    });
    REQUIRE(life.trainer.run() == Outcome::kInterrupted);
    REQUIRE(life.trainer.step() == 3);
  }
  {
    Life life(stopped);
    life.trainer.resume();
    REQUIRE(life.trainer.step() == 3);
    life.trainer.set_progress([](const StepReport& report) { return report.step < 7; });
    REQUIRE(life.trainer.run() == Outcome::kInterrupted);
    REQUIRE(life.trainer.step() == 7);
    life.trainer.set_progress(nullptr);
    REQUIRE(life.trainer.run() == Outcome::kFinished);  // the same object goes on, too
  }
  REQUIRE(read_file(stopped + "/state.safetensors") == expected);
  REQUIRE(steps_of(stopped) == steps_of(folder / "whole"));
}

TEST_CASE("a half-written line of telemetry is dropped on resuming") {
  const ScratchFolder folder;
  const std::string path = folder / "run";
  {
    Life life(path);
    life.trainer.set_progress([](const StepReport& report) { return report.step < 5; });
    life.trainer.run();
  }
  std::ofstream(path + "/telemetry.jsonl", std::ios::app) << R"({"step": 6, "lo)";
  Life life(path);
  life.trainer.resume();
  life.trainer.run();
  REQUIRE(steps_of(path).size() == 12);
}

TEST_CASE("a folder with another run's state is left alone") {
  const ScratchFolder folder;
  const std::string path = folder / "run";
  const std::string state = uninterrupted(path), lines = read_file(path + "/telemetry.jsonl");
  Life life(path);
  REQUIRE_THAT(message([&] { life.trainer.run(); }),
               Catch::Contains(path) && Catch::Contains("resume it, or choose another folder"));
  REQUIRE(read_file(path + "/state.safetensors") == state);
  REQUIRE(read_file(path + "/telemetry.jsonl") == lines);
}

TEST_CASE("resuming refuses what is not this run") {
  const ScratchFolder folder;
  const std::string path = folder / "run";
  REQUIRE_THAT(message([&] { Life(folder / "empty").trainer.resume(); }), Catch::Contains("got none"));
  REQUIRE_THAT(message([&] { Life("").trainer.resume(); }), Catch::Contains("not saved"));
  uninterrupted(path);
  const auto resume = [&](const std::function<void(Options&)>& change, int64_t text = 400) {
    Options options = tiny_options();
    change(options);
    return message([&] { Life(path, options, text).trainer.resume(); });
  };
  REQUIRE(resume([](Options&) {}) == "accepted");
  REQUIRE(resume([](Options& o) { o.save_every = 1; }) == "accepted");
  REQUIRE_THAT(resume([](Options& o) { o.learning_rate = 3e-2; }),
               Catch::Contains("learning_rate: expected 0.03, got 0.01"));
  REQUIRE_THAT(resume([](Options& o) { o.frozen = {"embed"}; }), Catch::Contains("frozen"));
  REQUIRE_THAT(resume([](Options&) {}, 399), Catch::Contains("text"));
}

TEST_CASE("a damaged state is refused before anything is copied") {
  const ScratchFolder folder;
  const std::string path = folder / "run", file = path + "/state.safetensors";
  const std::string state = uninterrupted(path);
  const auto damaged = [&](const std::string& bytes) {
    write_file(file, bytes);
    Life life(path);
    const at::Tensor before = life.setup.student->up->weight.detach().clone();
    const std::string text = message([&] { life.trainer.resume(); });
    REQUIRE(life.setup.student->up->weight.equal(before));
    return text;
  };
  const auto replaced = [&](const std::string& from, const std::string& to) {
    REQUIRE(from.size() == to.size());
    std::string bytes = state;
    const auto where = bytes.find(from);
    REQUIRE(where != std::string::npos);
    return damaged(bytes.replace(where, from.size(), to));
  };
  REQUIRE_THAT(damaged(state.substr(0, state.size() / 2)), Catch::Contains(file));
  REQUIRE_THAT(damaged(""), Catch::Contains(file));
  REQUIRE_THAT(replaced("\"libqat.step\":\"12\"", "\"libqat.step\":\"13\""), Catch::Contains("step"));
  REQUIRE_THAT(replaced("\"libqat.step\":\"12\"", "\"libqat.stop\":\"12\""), Catch::Contains("libqat.step"));
  REQUIRE_THAT(replaced("\"libqat.state\":\"1\"", "\"libqat.state\":\"2\""), Catch::Contains("format"));
  REQUIRE_THAT(replaced("latent/up.weight", "latent/uq.weight"), Catch::Contains("latent/up.weight"));
}

TEST_CASE("a loss that is not finite names the step and leaves weights and saved state") {
  const ScratchFolder folder;
  const std::string path = folder / "run";
  TinySetup setup;
  Options options = tiny_options();
  options.telemetry_every = 0;  // the student is called for the steps alone
  int64_t calls = 0;
  at::Tensor before;
  Trainer trainer(
      *setup.model,
      [&](const at::Tensor& tokens) {
        before = setup.student->embed->weight.detach().clone();
        const at::Tensor logits = setup.student->forward(tokens);
        return ++calls == 7 ? logits * std::numeric_limits<float>::quiet_NaN() : logits;
      },
      setup.teacher_function(), tiny_data(), options, path);
  REQUIRE_THROWS_AS(trainer.run(), qat::NumericError);
  REQUIRE(trainer.step() == 6);
  REQUIRE(setup.student->embed->weight.equal(before));
  Life life(path, options);
  life.trainer.resume();
  REQUIRE(life.trainer.step() == 5);
  calls = 6;
  REQUIRE_THROWS_WITH(trainer.run(), Catch::Contains("step 7: loss") && Catch::Contains("learning_rate"));
}

TEST_CASE("bad arguments of a trainer are named") {
  TinySetup setup;
  const TokenData data = tiny_data(20);
  const auto refusal = [&](const std::function<void(Options&)>& change, bool teacher = true) -> std::string {
    Options options = tiny_options();
    change(options);
    try {
      Trainer trainer(*setup.model, setup.student_function(), teacher ? setup.teacher_function() : nullptr,
                      data, options, "");
    } catch (const qat::ArgumentError& error) {
      return error.what();
    }
    return "accepted";
  };
  REQUIRE(refusal([](Options&) {}) == "accepted");
  REQUIRE_THAT(refusal([](Options& o) { o.steps = -1; }), Catch::Contains("steps"));
  REQUIRE_THAT(refusal([](Options&) {}, false), Catch::Contains("teacher"));
  REQUIRE(refusal([](Options& o) { o.objective = {0, 1, 1}; }, false) == "accepted");
  REQUIRE_THAT(refusal([](Options& o) { o.sequence_length = 21; }), Catch::Contains("text"));
  REQUIRE_THAT(refusal([](Options& o) { o.frozen = {"embed", "nothing"}; }),
               Catch::Contains("frozen[1]") && Catch::Contains("nothing"));
  REQUIRE_THAT(refusal([](Options& o) { o.frozen = {".*"}; }), Catch::Contains("parameter to train"));
  setup.student->embed->weight.set_data(setup.student->embed->weight.to(at::kBFloat16));
  REQUIRE_THAT(refusal([](Options&) {}), Catch::Contains("embed.weight") && Catch::Contains("float32"));
  REQUIRE(refusal([](Options& o) { o.frozen = {"embed"}; }) == "accepted");
}

TEST_CASE("a run folder that cannot be made is a file error") {
  const ScratchFolder folder;
  std::ofstream(folder / "file") << "x";
  Life life(folder / "file/run");
  REQUIRE_THAT(message([&] { life.trainer.run(); }), Catch::Contains("file/run"));
}
