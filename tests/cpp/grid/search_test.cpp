// The scale search: what it promises (no block worse than by the consumer's rule), and how close it comes to
// the best scale, found here by a dense scan in double.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "catch.hpp"
#include "qat/grid/grid.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::ScaleRule;
using qat::test::coded_grids;
using qat::test::Row;

namespace {

int64_t one_block(const grid::Grid& g) {
  return g.info().block > 0 ? g.info().block : 192;
}

/// The squared error, in double, of the block that decodes from scales s; infinite where the file cannot hold
/// them.
double squared_error(const grid::Grid& g, const Row& w, const Row& s) {
  const auto n = static_cast<int64_t>(w.size());
  Row stored(s.size());
  if (g.store(s.data(), n, stored.data()) != grid::Status::kOk) return HUGE_VAL;
  std::vector<int8_t> codes(w.size());
  Row w_hat(w.size());
  g.encode(w.data(), n, s.data(), codes.data());
  g.decode(codes.data(), n, stored.data(), w_hat.data());
  double sum = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    const double error = static_cast<double>(w[i]) - static_cast<double>(w_hat[i]);
    sum += error * error;
  }
  return sum;
}

Row scales_by(ScaleRule rule, const grid::Grid& g, const Row& w) {
  const auto n = static_cast<int64_t>(w.size());
  Row s(static_cast<size_t>(g.blocks(n) * g.params()));
  REQUIRE(g.scales(rule, w.data(), n, s.data()) == grid::Status::kOk);
  return s;
}

bool finite(const Row& w) {
  return std::all_of(w.begin(), w.end(), [](float value) { return std::isfinite(value); });
}

/// Errors are compared after float32 sums of up to 32 squares in a lane, and squares of rounded differences.
constexpr double kSumRounding = 1.0 + 40 * 0x1p-24;

void require_no_worse(const grid::Grid& g, const Row& w) {
  const double reference = squared_error(g, w, scales_by(ScaleRule::kReference, g, w));
  const double searched = squared_error(g, w, scales_by(ScaleRule::kSearch, g, w));
  INFO(reference << " -> " << searched);
  REQUIRE((searched <= reference * kSumRounding || reference == HUGE_VAL));
}

struct Shares {
  double reference;  ///< RMS error / RMS of the weights
  double search;
  double best;
};

/// Over random blocks. best: a scan of scales of both signs in steps of 1/500 of the largest magnitude's.
Shares gaussian_errors(const grid::Grid& g, int blocks, bool negative) {
  std::mt19937 generator(11);
  std::normal_distribution<float> normal;
  const int reach = std::max(-g.info().code_min, g.info().code_max);
  double energy = 0;
  Shares sums{};
  for (int b = 0; b < blocks; ++b) {
    Row w(static_cast<size_t>(one_block(g)));
    for (float& value : w) value = normal(generator);
    for (const float value : w) energy += static_cast<double>(value) * value;
    sums.reference += squared_error(g, w, scales_by(ScaleRule::kReference, g, w));
    sums.search += squared_error(g, w, scales_by(ScaleRule::kSearch, g, w));
    float largest = 0;
    for (const float value : w) largest = std::max(largest, std::abs(value));
    const float unit = largest / static_cast<float>(reach);
    double best = HUGE_VAL;
    for (int step = 100; step <= 650; ++step) {
      const float scale = unit * static_cast<float>(step) / 500.0F;
      best = std::min(best, squared_error(g, w, {scale}));
      if (negative) best = std::min(best, squared_error(g, w, {-scale}));
    }
    sums.best += best;
  }
  return {std::sqrt(sums.reference / energy), std::sqrt(sums.search / energy), std::sqrt(sums.best / energy)};
}

}  // namespace

TEST_CASE("a searched scale never leaves a block worse than the reference's") {
  std::mt19937 generator(12);
  for (const std::string_view name : coded_grids()) {
    const grid::Grid& g = grid::find(name);
    INFO(name);
    for (int i = 0; i < 60; ++i) {
      Row w = qat::test::random_row(generator, one_block(g), i % 30 - 15);
      if (i % 3 == 0) w[static_cast<size_t>(i) % w.size()] *= 50.0F;
      require_no_worse(g, w);
    }
    for (const Row& w : qat::test::adversarial_rows(one_block(g))) {
      if (finite(w)) require_no_worse(g, w);
    }
  }
}

TEST_CASE("a block that the reference's scale holds exactly keeps that scale") {
  for (const std::string_view name : coded_grids()) {
    const grid::Grid& g = grid::find(name);
    std::mt19937 generator(13);
    for (int i = 0; i < 20; ++i) {
      const Row first = qat::test::random_row(generator, one_block(g), i - 11);
      Row w(first.size());
      REQUIRE(g.fake_quantize(first.data(), one_block(g), w.data()) == grid::Status::kOk);
      const Row reference = scales_by(ScaleRule::kReference, g, w);
      if (squared_error(g, w, reference) == 0) REQUIRE(scales_by(ScaleRule::kSearch, g, w) == reference);
    }
  }
}

TEST_CASE("search comes close to the best scale of normally distributed blocks") {
  struct Expected {
    const char* name;
    double most;  ///< of the best error
  };
  // Measured 1.009 and 1.0013; the rest is what another seed may move.
  for (const Expected& expected : {Expected{"q4_0", 1.02}, Expected{"q2_0", 1.005}}) {
    const Shares share = gaussian_errors(grid::find(expected.name), 150, true);
    INFO(expected.name << ": " << share.reference << " -> " << share.search << ", best " << share.best);
    REQUIRE(share.search < share.reference);
    REQUIRE(share.search < expected.most * share.best);
  }
}

TEST_CASE("search, store, encode and decode in turn are fake_quantize with a search") {
  std::mt19937 generator(14);
  for (const std::string_view name : coded_grids()) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = g.info().block > 0 ? 3 * g.info().block : 97;
    for (int exponent = -150; exponent <= qat::test::most_exponent(name); exponent += 6) {
      const Row w = qat::test::random_row(generator, n, exponent);
      const Row s = scales_by(ScaleRule::kSearch, g, w);
      std::vector<int8_t> codes(w.size());
      Row stored(s.size());
      Row by_parts(w.size());
      Row at_once(w.size());
      REQUIRE(g.store(s.data(), n, stored.data()) == grid::Status::kOk);
      g.encode(w.data(), n, s.data(), codes.data());
      g.decode(codes.data(), n, stored.data(), by_parts.data());
      REQUIRE(g.fake_quantize(w.data(), n, at_once.data(), ScaleRule::kSearch) == grid::Status::kOk);
      INFO(name << ", exponent " << exponent);
      REQUIRE(std::memcmp(by_parts.data(), at_once.data(), w.size() * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("vectorised searches follow the options of a name") {
  std::mt19937 generator(15);
  for (const std::string_view name : {"int4_g32@bf16:bf16", "int2_channel@fp16:fp16", "int4_g64@pow2",
                                      "int3_channel_asym@bf16:fp16", "mlx4_g64@bf16", "mlx2_g32@fp16"}) {
    const grid::Grid& fast = grid::find(name);
    for (int i = 0; i < 60; ++i) {
      const Row w = qat::test::random_row(generator, fast.info().block > 0 ? fast.info().block : 301, i - 40);
      const auto n = static_cast<int64_t>(w.size());
      Row expected(w.size());
      Row got(w.size());
      const grid::Status status =
          grid::reference(name).fake_quantize(w.data(), n, expected.data(), ScaleRule::kSearch);
      REQUIRE(fast.fake_quantize(w.data(), n, got.data(), ScaleRule::kSearch) == status);
      if (status != grid::Status::kOk) continue;
      REQUIRE(std::memcmp(got.data(), expected.data(), w.size() * sizeof(float)) == 0);
      require_no_worse(fast, w);
    }
  }
}

TEST_CASE("a search refuses what no scale can hold, as the reference does") {
  for (const std::string_view name : coded_grids()) {
    const grid::Grid& g = grid::find(name);
    Row w = qat::test::filled(one_block(g), 1.0F);
    Row s(static_cast<size_t>(g.params()));
    w[5] = qat::test::kNan;
    REQUIRE(g.search(w.data(), one_block(g), s.data()) == grid::Status::kNotFinite);
    REQUIRE(g.fake_quantize(w.data(), one_block(g), w.data(), ScaleRule::kSearch) ==
            grid::Status::kNotFinite);
  }
}
