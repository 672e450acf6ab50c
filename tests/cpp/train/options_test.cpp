#include "qat/train/options.hpp"

#include <cmath>
#include <functional>
#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"

namespace {

using qat::train::learning_rate_at;
using qat::train::Options;
using qat::train::options_from_json;

std::string refusal(const std::function<void(Options&)>& spoil) {
  Options options;
  spoil(options);
  try {
    validate(options);
  } catch (const qat::ArgumentError& error) {
    return error.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE("options survive JSON, and what is left out keeps its default") {
  Options options;
  options.steps = 7;
  options.learning_rate = 3.0e-5;
  options.objective = {0.25, 0.75, 2, 0.5, 0.1, 0.85, 0.2, 0.3};
  options.compute_dtype = "float32";
  options.frozen = {"model\\.embed_tokens", "a|b"};
  options.seed = -5;
  options.scale_learning_rate = 2e-3;
  options.ema = 0.9;
  options.delay = 0.1;
  options.blend = 0.2;
  options.progressive = {{"q8_0", 0.25}, {"q4_0", 0.5}};
  options.unfreeze = {"first", 0.5};
  options.oscillation = {0.02, 0.04, 1e-4};
  options.prox = {0, 5};
  const std::string json = to_json(options);
  REQUIRE(to_json(options_from_json(json)) == json);
  REQUIRE(to_json(options_from_json("{}")) == to_json(Options{}));
  const Options some = options_from_json(R"({"objective": {"ce": 1}, "warmup": 0})");
  REQUIRE(some.objective.ce == 1);
  REQUIRE(some.objective.kl == 1);
  REQUIRE(some.warmup == 0);
}

TEST_CASE("malformed options are refused by JSON path") {
  REQUIRE_THROWS_WITH(
      options_from_json(R"({"learning_rat": 1})"),
      Catch::Contains("options: learning_rat: expected one of steps, ") && Catch::Contains("unknown key"));
  REQUIRE_THROWS_WITH(options_from_json(R"({"objective": {"mse": 1}})"),
                      Catch::Contains("objective.mse: expected one of kl, ce, temperature"));
  REQUIRE_THROWS_WITH(options_from_json(R"({"steps": 1.5})"), "options: steps: expected an integer, got 1.5");
  REQUIRE_THROWS_WITH(options_from_json(R"({"steps": 18446744073709551615})"), Catch::Contains("an integer"));
  REQUIRE_THROWS_WITH(options_from_json(R"({"objective": {"kl": "1"}})"),
                      "options: objective.kl: expected a number, got \"1\"");
  REQUIRE_THROWS_WITH(options_from_json(R"({"objective": 1})"),
                      "options: objective: expected an object, got 1");
  REQUIRE_THROWS_WITH(options_from_json(R"({"frozen": "a"})"), Catch::Contains("a list of strings"));
  REQUIRE_THROWS_WITH(options_from_json(R"({"frozen": ["a", 1]})"), Catch::Contains("frozen[1]"));
  REQUIRE_THROWS_WITH(options_from_json(R"({"prox": {"end": 1}})"),
                      Catch::Contains("prox.end: expected one of until, steepness"));
  REQUIRE_THROWS_WITH(options_from_json(R"({"progressive": {"grid": "q8_0"}})"),
                      Catch::Contains("progressive: expected a list of objects"));
  REQUIRE_THROWS_WITH(
      options_from_json(R"({"progressive": [{"grid": "q8_0", "until": 0.5}, {"until": "x"}]})"),
      Catch::Contains("progressive[1].until: expected a number"));
  REQUIRE_THROWS_WITH(options_from_json("[1]"), Catch::Contains("a JSON object"));
  REQUIRE_THROWS_WITH(options_from_json("{"), Catch::Contains("a JSON object"));
  REQUIRE_THROWS_WITH(options_from_json(R"({"steps": 0})"), "options: steps: expected at least 1, got 0");
}

TEST_CASE("every option has a legal range") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  REQUIRE(refusal([](Options&) {}) == "accepted");
  REQUIRE_THAT(refusal([](Options& o) { o.steps = 0; }), Catch::Contains("options: steps"));
  REQUIRE_THAT(refusal([](Options& o) { o.batch_size = 0; }), Catch::Contains("batch_size"));
  REQUIRE_THAT(refusal([](Options& o) { o.sequence_length = 1; }), Catch::Contains("sequence_length"));
  REQUIRE_THAT(refusal([](Options& o) { o.accumulate = -1; }), Catch::Contains("accumulate"));
  REQUIRE_THAT(refusal([](Options& o) { o.learning_rate = 0; }), Catch::Contains("learning_rate"));
  REQUIRE_THAT(refusal([&](Options& o) { o.learning_rate = nan; }), Catch::Contains("learning_rate"));
  REQUIRE_THAT(refusal([](Options& o) { o.warmup = 1.1; }), Catch::Contains("warmup"));
  REQUIRE_THAT(refusal([](Options& o) { o.final_learning_rate = -0.1; }),
               Catch::Contains("final_learning_rate"));
  REQUIRE_THAT(refusal([](Options& o) { o.beta1 = 1; }), Catch::Contains("beta1"));
  REQUIRE_THAT(refusal([](Options& o) { o.beta2 = -0.1; }), Catch::Contains("beta2"));
  REQUIRE_THAT(refusal([](Options& o) { o.epsilon = 0; }), Catch::Contains("epsilon"));
  REQUIRE_THAT(refusal([](Options& o) { o.weight_decay = -1; }), Catch::Contains("weight_decay"));
  REQUIRE_THAT(refusal([&](Options& o) { o.clip_norm = nan; }), Catch::Contains("clip_norm"));
  REQUIRE_THAT(refusal([](Options& o) { o.objective = {0, 0, 1}; }), Catch::Contains("objective"));
  REQUIRE_THAT(refusal([](Options& o) { o.objective.kl = -1; }), Catch::Contains("objective.kl"));
  REQUIRE_THAT(refusal([](Options& o) { o.objective.reverse_kl = -1; }), Catch::Contains("reverse_kl"));
  REQUIRE_THAT(refusal([&](Options& o) { o.objective.jsd = nan; }), Catch::Contains("objective.jsd"));
  REQUIRE_THAT(refusal([](Options& o) { o.objective.jsd_alpha = 1; }), Catch::Contains("jsd_alpha"));
  REQUIRE_THAT(refusal([](Options& o) { o.objective.cakld = -0.1; }), Catch::Contains("objective.cakld"));
  REQUIRE_THAT(refusal([](Options& o) { o.objective.cakld_beta = -0.5; }), Catch::Contains("cakld_beta"));
  REQUIRE(refusal([](Options& o) { o.objective = {0, 0, 1, 0, 1}; }) == "accepted");
  REQUIRE_THAT(refusal([](Options& o) { o.objective.temperature = 0; }),
               Catch::Contains("objective.temperature"));
  REQUIRE_THAT(refusal([&](Options& o) { o.scale_learning_rate = nan; }),
               Catch::Contains("scale_learning_rate"));
  REQUIRE_THAT(refusal([](Options& o) { o.ema = 1; }), Catch::Contains("options: ema"));
  REQUIRE_THAT(refusal([](Options& o) { o.delay = 1; }), Catch::Contains("delay"));
  REQUIRE_THAT(refusal([](Options& o) { o.blend = -0.1; }), Catch::Contains("blend"));
  REQUIRE_THAT(refusal([](Options& o) {
                 o.delay = 0.6;
                 o.blend = 0.5;
               }),
               Catch::Contains("at most 1 together"));
  REQUIRE_THAT(refusal([](Options& o) { o.progressive = {{"q9_0", 0.5}}; }),
               Catch::Contains("progressive[0].grid") && Catch::Contains("q9_0"));
  REQUIRE_THAT(refusal([](Options& o) { o.progressive = {{"bf16", 0.5}}; }), Catch::Contains("integer grid"));
  REQUIRE_THAT(refusal([](Options& o) { o.progressive = {{"q8_0", 0.5}, {"q4_0", 0.5}}; }),
               Catch::Contains("progressive[1].until"));
  REQUIRE_THAT(refusal([](Options& o) { o.unfreeze.from = "middle"; }), Catch::Contains("first or last"));
  REQUIRE_THAT(refusal([](Options& o) { o.unfreeze.until = 1; }), Catch::Contains("unfreeze.until"));
  REQUIRE_THAT(refusal([](Options& o) { o.oscillation.momentum = 0; }), Catch::Contains("momentum"));
  REQUIRE_THAT(refusal([](Options& o) { o.oscillation.freeze_above = 1; }), Catch::Contains("freeze_above"));
  REQUIRE_THAT(refusal([](Options& o) { o.oscillation.damping = -1; }), Catch::Contains("damping"));
  REQUIRE_THAT(refusal([](Options& o) { o.prox.until = 1.5; }), Catch::Contains("prox.until"));
  REQUIRE_THAT(refusal([](Options& o) { o.prox.steepness = 0; }), Catch::Contains("steepness"));
  REQUIRE_THAT(refusal([](Options& o) {
                 o.prox.until = 1;
                 o.delay = 0.1;
               }),
               Catch::Contains("options: prox"));
  REQUIRE_THAT(refusal([](Options& o) { o.compute_dtype = "half"; }),
               Catch::Contains("auto, float32, bfloat16"));
  REQUIRE_THAT(refusal([](Options& o) { o.frozen = {"ok", "("}; }), Catch::Contains("frozen[1]"));
  REQUIRE_THAT(refusal([](Options& o) { o.save_every = -1; }), Catch::Contains("save_every"));
  REQUIRE_THAT(refusal([](Options& o) { o.eval_every = -1; }), Catch::Contains("eval_every"));
  REQUIRE_THAT(refusal([](Options& o) { o.telemetry_every = -1; }), Catch::Contains("telemetry_every"));
}

TEST_CASE("the learning rate warms up, peaks, and ends at its share of the peak") {
  Options options;
  options.steps = 50;
  options.learning_rate = 2e-3;
  options.warmup = 0.1;
  options.final_learning_rate = 0.2;
  REQUIRE(learning_rate_at(options, 1) == Approx(2e-3 / 5));
  REQUIRE(learning_rate_at(options, 4) == Approx(2e-3 * 4 / 5));
  REQUIRE(learning_rate_at(options, 5) == 2e-3);
  // 45 steps of cosine follow; one third of them is 60 degrees, two thirds 120.
  REQUIRE(learning_rate_at(options, 20) == Approx(2e-3 * (0.2 + 0.8 * 0.75)));
  REQUIRE(learning_rate_at(options, 35) == Approx(2e-3 * (0.2 + 0.8 * 0.25)));
  REQUIRE(learning_rate_at(options, 50) == Approx(2e-3 * 0.2));
  for (int64_t step = 6; step <= 50; ++step) {
    REQUIRE(learning_rate_at(options, step) < learning_rate_at(options, step - 1));
  }
  options.warmup = 0;
  REQUIRE(learning_rate_at(options, 1) < 2e-3);
  REQUIRE(learning_rate_at(options, 25) == Approx(2e-3 * 0.6));
  options.warmup = 1;
  REQUIRE(learning_rate_at(options, 50) == 2e-3);
  options.warmup = 0;
  options.steps = 1;
  REQUIRE(learning_rate_at(options, 1) == Approx(2e-3 * 0.2));
}
