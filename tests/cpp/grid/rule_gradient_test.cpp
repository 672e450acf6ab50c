// The gradients of the scale rules, against differences of the rules themselves: these are linear in the
// weights as long as the same weights are the largest, the least and the greatest.

#include <cmath>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::Row;

namespace {

bool searches_or_rounds(std::string_view name) {
  return name.ends_with("_k") || name.ends_with("fp4");
}

bool has_zero_point(std::string_view name) {
  return name.find("_asym") != std::string_view::npos;
}

Row chosen(const grid::Grid& g, const Row& w) {
  const auto n = static_cast<int64_t>(w.size());
  Row s(static_cast<size_t>(g.blocks(n) * g.params()));
  REQUIRE(g.choose(w.data(), n, s.data()) == grid::Status::kOk);
  return s;
}

Row gradient(const grid::Grid& g, const Row& w, const Row& grad_s, float start = 0.0F) {
  Row grad_w(w.size(), start);
  REQUIRE(g.choose_backward(w.data(), static_cast<int64_t>(w.size()), grad_s.data(), grad_w.data()) ==
          grid::Status::kOk);
  return grad_w;
}

/// sum of grad_s * (to - from).
double product(const Row& grad_s, const Row& from, const Row& to) {
  double sum = 0;
  for (size_t p = 0; p < grad_s.size(); ++p) sum += grad_s[p] * (static_cast<double>(to[p]) - from[p]);
  return sum;
}

}  // namespace

TEST_CASE("choose_backward is the slope of choose") {
  std::mt19937 generator(31);
  constexpr float kStep = 0x1p-9F;
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& g = grid::find(name);
    if (!g.rule_has_gradient()) continue;
    const int64_t n = g.info().block > 0 ? 2 * g.info().block : 37;
    for (int repeat = 0; repeat < 3; ++repeat) {
      Row w = qat::test::random_row(generator, n, 0);
      for (float& value : w) {
        if (std::abs(value) < 0.01F) value = 0.02F;  // a step leads to no other sign
      }
      for (int64_t i = 0; i < n; i += g.block(n)) {  // the ends of a block by a margin
        w[static_cast<size_t>(i) + 3] = repeat == 1 ? 5.0F : -5.0F;
        w[static_cast<size_t>(i) + 8] = repeat == 1 ? -4.75F : 4.75F;
      }
      const Row s = chosen(g, w);
      Row grad_s = qat::test::random_row(generator, static_cast<int64_t>(s.size()), 0);
      // An integer has no slope: the next test has its formula.
      for (size_t p = 1; has_zero_point(name) && p < s.size(); p += 2) grad_s[p] = 0.0F;
      const Row got = gradient(g, w, grad_s);
      for (size_t i = 0; i < w.size(); ++i) {
        Row more = w;
        Row less = w;
        more[i] += kStep;
        less[i] -= kStep;
        const double slope = product(grad_s, chosen(g, less), chosen(g, more)) /
                             (static_cast<double>(more[i]) - static_cast<double>(less[i]));
        INFO(name << ", weight " << i << ", " << w[i]);
        // A scale is rounded to 2^-24 of at most 5, over a step of 2^-8, times a gradient of up to 4.
        REQUIRE(std::abs(got[i] - slope) <= 4e-4);
        if (std::abs(w[i]) < 4.0F && name != "q1_0") REQUIRE(got[i] == 0.0F);
      }
    }
  }
}

TEST_CASE("the gradient of a zero point passes straight through its rounding") {
  for (const std::string_view name : {"int4_g32_asym", "int8_channel_asym", "int2_g64_asym@fp16"}) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = g.block(32);
    const double steps = g.info().code_max - g.info().code_min;
    Row w = qat::test::filled(n, 0.125F);
    w[5] = -1.5F;
    w[9] = 2.25F;
    const Row got = gradient(g, w, {0.5F, 0.75F});
    // z = low - from / s, s = (to - from) / steps.
    const double s = 3.75 / steps;
    const double of_to = 0.5 / steps + 0.75 * (-1.5 / (s * s)) / steps;
    const double of_from = 0.5 * -1 / steps + 0.75 * (-1 / s + -1.5 / (s * s) * (-1 / steps));
    INFO(name);
    REQUIRE(got[9] == Approx(of_to).epsilon(1e-6));  // a few float32 roundings
    REQUIRE(got[5] == Approx(of_from).epsilon(1e-6));
    REQUIRE(got[0] == 0.0F);
  }
}

TEST_CASE("choose_backward adds, takes the first of equals, and nothing from constants of a rule") {
  Row w = qat::test::filled(32, 0.25F);
  w[4] = w[7] = -2.0F;
  const Row got = gradient(grid::find("q4_0"), w, {8.0F}, 1.0F);
  REQUIRE(got[4] == 0.0F);
  REQUIRE(got[7] == 1.0F);
  REQUIRE(gradient(grid::find("q8_0"), w, {127.0F}, 1.0F)[4] == 0.0F);
  const Row zeros = qat::test::filled(256, 0.0F);
  for (const std::string_view name : qat::test::coded_grids_with_options()) {
    const grid::Grid& g = grid::find(name);
    if (!g.rule_has_gradient() || name == "q4_0" || name == "q5_0" || name == "q4_1" || name == "q5_1")
      continue;
    INFO(name);
    REQUIRE(gradient(g, zeros, Row(static_cast<size_t>(g.blocks(256) * g.params()), 1.0F)) == zeros);
  }
}

TEST_CASE("a rule without a gradient says so") {
  for (const std::string_view name : qat::test::coded_grids()) {
    const grid::Grid& g = grid::find(name);
    REQUIRE(g.rule_has_gradient() == !searches_or_rounds(name));
    if (g.rule_has_gradient()) continue;
    REQUIRE_THROWS_AS(g.choose_backward(nullptr, g.info().block, nullptr, nullptr), qat::UnsupportedError);
  }
  Row w = qat::test::filled(32, 1.0F);
  w[3] = qat::test::kNan;
  const Row grad_s{1.0F};
  REQUIRE(grid::find("q4_0").choose_backward(w.data(), 32, grad_s.data(), w.data()) ==
          grid::Status::kNotFinite);
}
