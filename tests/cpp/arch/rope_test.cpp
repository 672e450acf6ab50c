#include "qat/arch/rope.hpp"

#include <cmath>
#include <map>
#include <numbers>

#include "catch.hpp"
#include "qat/core/error.hpp"

using Catch::Contains;
using namespace qat::arch;

namespace {

using Values = std::map<std::string, ConfigValue, std::less<>>;

Rope read(const Values& values) {
  return read_rope([&values](std::string_view path) -> ConfigValue {
    const auto found = values.find(path);
    return found == values.end() ? ConfigValue() : found->second;
  });
}

Rope llama31() {
  Rope rope;
  rope.theta = 500000.0;
  rope.type = RopeType::kLlama3;
  rope.factor = 8.0;
  rope.original_context = 8192.0;
  return rope;
}

std::vector<float> rounded(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

}  // namespace

TEST_CASE("nothing said means base 10000 without scaling") {
  REQUIRE(read({}) == Rope());
  REQUIRE(rope_divisors(Rope(), 8) == std::vector<double>{1, 1, 1, 1});
}

TEST_CASE("llama3: short waves stay, long ones are divided, a ramp lies between") {
  const Rope rope = llama31();
  const auto divisors = rope_divisors(rope, 128);
  REQUIRE(divisors.size() == 64);
  int between = 0;
  for (std::size_t i = 0; i < divisors.size(); ++i) {
    const double wave = 2 * std::numbers::pi * std::pow(rope.theta, static_cast<double>(i) / 64.0);
    if (wave < 2048) REQUIRE(divisors[i] == 1.0);
    if (wave > 8192) REQUIRE(divisors[i] == 8.0);
    if (wave > 2048 && wave < 8192) {
      // The frequency is mixed linearly in the turns that the context holds: 1 turn divided, 4 turns not.
      const double share = (8192 / wave - 1) / 3;
      REQUIRE(1 / divisors[i] == Approx((1 - share) / 8 + share).epsilon(1e-12));
      ++between;
    }
  }
  REQUIRE(between == 6);
}

TEST_CASE("yarn: the ramp runs over the pairs between 32 turns and 1 turn in the context") {
  Rope rope;
  rope.type = RopeType::kYarn;
  rope.factor = 4.0;
  rope.original_context = 2048.0;
  const auto divisors = rope_divisors(rope, 64);
  // Pair i turns 2048 / (2 pi 10000^(i / 32)) times: 32 at i = 8.06, once at i = 20.1.
  for (std::size_t i = 0; i <= 8; ++i) REQUIRE(divisors[i] == 1.0);
  for (std::size_t i = 21; i < 32; ++i) REQUIRE(divisors[i] == Approx(4.0).epsilon(1e-12));
  for (std::size_t i = 9; i < 21; ++i) {
    REQUIRE(divisors[i] == Approx(1 / (1 - 0.75 * static_cast<double>(i - 8) / 13)).epsilon(1e-12));
  }
  REQUIRE(yarn_attention_factor(4.0) == Approx(1 + 0.1 * std::log(4.0)));
  REQUIRE(yarn_attention_factor(0.5) == 1.0);
}

TEST_CASE("divisors lead back to a scaling that gives them") {
  for (const double factor : {2.0, 8.0, 32.0}) {
    for (const double high : {2.5, 4.0}) {
      Rope rope = llama31();
      rope.factor = factor;
      rope.high_freq_factor = high;
      const auto found = rope_of_divisors(rounded(rope_divisors(rope, 128)), rope.theta);
      REQUIRE(found.has_value());
      REQUIRE(*found == rope);
    }
  }
  Rope linear;
  linear.type = RopeType::kLinear;
  linear.factor = 2.5;
  REQUIRE(rope_of_divisors({2.5F, 2.5F}, 10000.0) == linear);
  REQUIRE(rope_of_divisors({1.0F, 1.0F}, 10000.0) == Rope());
}

TEST_CASE("parameters of which only the ratios are known are found up to a common factor") {
  Rope rope = llama31();
  rope.low_freq_factor = 1.7;
  rope.high_freq_factor = 5.1;
  rope.original_context = 3333.0;
  const auto divisors = rope_divisors(rope, 128);
  const auto found = rope_of_divisors(rounded(divisors), rope.theta);
  REQUIRE(found.has_value());
  const auto again = rope_divisors(*found, 128);
  for (std::size_t i = 0; i < again.size(); ++i) REQUIRE(again[i] == Approx(divisors[i]).epsilon(2e-6));
  REQUIRE(found->original_context == std::round(found->original_context));
}

TEST_CASE("divisors that no known scaling gives are refused, whatever they are") {
  const float nan = std::nanf(""), infinity = HUGE_VALF;
  for (const std::vector<float>& divisors : {std::vector<float>{1, 2, 3, 4},
                                             {4, 4, 1, 1},
                                             {1, 1, 1, nan},
                                             {nan, 1, 1, 4},
                                             {0, 0, 0, 0},
                                             {1, 1, 1, infinity},
                                             {-2, -2, -2, -2},
                                             {1, 4, 1, 4}}) {
    REQUIRE_FALSE(rope_of_divisors(divisors, 10000.0).has_value());
  }
}

TEST_CASE("both spellings are read, and a contradiction between them is refused") {
  const std::string kType = "llama3";
  Values values{{"rope_theta", 500000.0},
                {"rope_scaling.type", kType},
                {"rope_scaling.factor", 8.0},
                {"rope_scaling.low_freq_factor", 1.0},
                {"rope_scaling.high_freq_factor", 4.0},
                {"rope_scaling.original_max_position_embeddings", 8192.0}};
  REQUIRE(read(values) == llama31());
  values["rope_scaling.rope_type"] = kType;
  REQUIRE(read(values) == llama31());
  values["rope_parameters.rope_type"] = std::string("linear");
  REQUIRE_THROWS_AS(read(values), qat::UnsupportedError);
}

TEST_CASE("the context is transformers': beside the scaling, in it, or the model's") {
  Values values{{"rope_parameters.rope_type", std::string("yarn")},
                {"rope_parameters.factor", 2.0},
                {"max_position_embeddings", 300.0}};
  REQUIRE(read(values).original_context == 300.0);
  values["rope_parameters.original_max_position_embeddings"] = 200.0;
  REQUIRE(read(values).original_context == 200.0);
  values["original_max_position_embeddings"] = 100.0;
  REQUIRE(read(values).original_context == 100.0);
}

TEST_CASE("errors name the key") {
  const auto message = [](const Values& values) -> std::string {
    try {
      read(values);
    } catch (const qat::Error& error) {
      return error.what();
    }
    return "no error";
  };
  REQUIRE_THAT(message({{"rope_scaling.type", std::string("dynamic")}}),
               Contains("\"rope_scaling.type\": expected") && Contains("got \"dynamic\""));
  REQUIRE_THAT(message({{"rope_theta", true}}), Contains("\"rope_theta\": expected a number, got true"));
  REQUIRE_THAT(message({{"rope_theta", -1.0}}), Contains("\"rope_theta\": expected a number > 0, got -1"));
  REQUIRE_THAT(message({{"partial_rotary_factor", 0.5}}), Contains("\"partial_rotary_factor\": expected 1"));
}
