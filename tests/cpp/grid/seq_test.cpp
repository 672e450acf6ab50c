// SEQ's half-integer levels in the grids that hold them, against ParetoQ's formulas in double.

#include <algorithm>
#include <cmath>

#include "catch.hpp"
#include "held_scales.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/seq.hpp"
#include "rows.hpp"

namespace grid = qat::grid;
using qat::test::Row;

namespace {

const std::vector<std::string> kHolding{"mlx2_g32",      "mlx2_g64@bf16", "mlx2_g128@fp16", "mlx3_g64",
                                        "mlx3_g32@fp16", "mlx4_g32",      "mlx4_g64@bf16",  "q2_k"};

/// A row with its free and tied scales, and alpha as the file holds it, for each weight.
struct Tied {
  Row w, free, s;
  std::vector<double> alpha;
};

Tied tied(const grid::Grid& g, std::mt19937& generator, int exponent) {
  const int64_t n = 2 * g.info().block;
  Tied row{qat::test::random_row(generator, n, exponent), {}, {}, {}};
  row.free.resize(static_cast<size_t>(g.blocks(n) * grid::seq_params(g)));
  row.s.resize(static_cast<size_t>(g.blocks(n) * g.params()));
  REQUIRE(grid::seq_start(g, row.w.data(), n, row.free.data()) == grid::Status::kOk);
  for (float& value : row.free) value *= 0.8F;  // so that some weights are clipped
  grid::seq_tie(g, row.free.data(), n, row.s.data());
  Row held(row.s.size());
  REQUIRE(g.store(row.s.data(), n, held.data()) == grid::Status::kOk);
  const double k = std::exp2(g.info().bits - 1);
  for (int64_t i = 0; i < n; ++i) {
    const float* of = held.data() + i / g.info().block * g.params();
    const bool two_levels = g.params() > 2;
    row.alpha.push_back(two_levels ? 2.0 * of[0] * of[2 + i % 256 / 16] : of[0] * k);
  }
  return row;
}

/// r, ties to even.
double nearest(double value) {
  return std::nearbyint(value);
}

}  // namespace

TEST_CASE("which grids hold SEQ") {
  for (const std::string& name : kHolding) REQUIRE(grid::holds_seq(grid::find(name)));
  for (const std::string_view name : qat::test::coded_grids()) {
    const bool holds =
        name == "q2_k" || name.starts_with("mlx2") || name.starts_with("mlx3") || name.starts_with("mlx4");
    REQUIRE(grid::holds_seq(grid::find(name)) == holds);
  }
}

TEST_CASE("tied scales decode exactly to odd multiples of alpha / 2k, the nearest of them") {
  std::mt19937 generator(41);
  for (const std::string& name : kHolding) {
    const grid::Grid& g = grid::find(name);
    const double k = std::exp2(g.info().bits - 1);
    for (int repeat = 0; repeat < 20; ++repeat) {
      const Tied row = tied(g, generator, repeat % 8 - 6);
      Row w_hat(row.w.size());
      const auto n = static_cast<int64_t>(row.w.size());
      REQUIRE(g.fake_quantize_with(row.w.data(), n, row.s.data(), w_hat.data()) == grid::Status::kOk);
      for (size_t i = 0; i < row.w.size(); ++i) {
        const double alpha = row.alpha[i];
        const double odd = 2 * k * w_hat[i] / alpha;
        INFO(name << ", weight " << i << ": " << row.w[i] << ", alpha " << alpha);
        if (alpha == 0) continue;  // a sub-scale that rounds to 0
        REQUIRE(odd == nearest(odd));
        REQUIRE(std::abs(std::fmod(odd, 2)) == 1);
        REQUIRE(std::abs(odd) <= 2 * k - 1);
        // ParetoQ's forward pass; its clip keeps r(k - 1/2) from rounding up.
        const double place = std::clamp(row.w[i] / alpha, -0.99, 0.99) * k - 0.5;
        if (std::abs(std::abs(place - std::floor(place)) - 0.5) < 1e-5) continue;  // a tie in float32
        REQUIRE(w_hat[i] == alpha * (nearest(place) + 0.5) / k);
      }
    }
  }
}

TEST_CASE("two bits: exactly +-alpha/4 times 1 and 3") {
  const grid::Grid& g = grid::find("mlx2_g32");
  Row w = qat::test::filled(32, 0.1F);
  for (size_t i = 0; i < w.size(); ++i) w[i] = (static_cast<float>(i) - 15.5F) / 15.5F * 0.7F;
  Row alpha(1), s(2), w_hat(32);
  REQUIRE(grid::seq_start(g, w.data(), 32, alpha.data()) == grid::Status::kOk);
  REQUIRE(alpha[0] == 0.7F);
  grid::seq_tie(g, alpha.data(), 32, s.data());
  const float tied_alpha = 2.0F * s[0];
  REQUIRE(std::abs(tied_alpha - 0.7F) <= 0x1p-23F);  // half of the 22nd bit
  REQUIRE(g.fake_quantize_with(w.data(), 32, s.data(), w_hat.data()) == grid::Status::kOk);
  std::vector<float> levels(w_hat);
  std::ranges::sort(levels);
  levels.erase(std::unique(levels.begin(), levels.end()), levels.end());
  REQUIRE(levels == std::vector<float>{-0.75F * tied_alpha, -0.25F * tied_alpha, 0.25F * tied_alpha,
                                       0.75F * tied_alpha});
}

TEST_CASE("the gradient of alpha is ParetoQ's") {
  std::mt19937 generator(42);
  for (const std::string& name : kHolding) {
    const grid::Grid& g = grid::find(name);
    const double k = std::exp2(g.info().bits - 1);
    const Tied row = tied(g, generator, -2);
    const auto n = static_cast<int64_t>(row.w.size());
    const Row grad = qat::test::random_row(generator, n, 0);
    Row w_hat(row.w.size()), grad_s(row.s.size()), got(row.free.size());
    REQUIRE(g.fake_quantize_with(row.w.data(), n, row.s.data(), w_hat.data()) == grid::Status::kOk);
    REQUIRE(g.backward(row.w.data(), n, row.s.data(), grad.data(), qat::EstimatorKind::kClippedSte, nullptr,
                       grad_s.data()) == grid::Status::kOk);
    grid::seq_tie_backward(g, grad_s.data(), n, got.data());
    std::vector<uint8_t> inside(row.w.size());
    g.in_range(row.w.data(), n, row.s.data(), inside.data());
    std::vector<double> expected(row.free.size());
    const auto params = static_cast<size_t>(grid::seq_params(g));
    for (size_t i = 0; i < row.w.size(); ++i) {
      if (row.alpha[i] == 0) continue;
      const double of_alpha =
          grad[i] * (inside[i] != 0 ? (w_hat[i] - static_cast<double>(row.w[i])) / row.alpha[i]
                                    : std::copysign((k - 0.5) / k, w_hat[i]));
      const size_t block = i / static_cast<size_t>(g.info().block);
      if (params == 1) {
        expected[block] += of_alpha;
        continue;
      }
      // alpha = 2 d a: by the chain rule to both.
      const size_t sub = 1 + i % 256 / 16;
      const double d = row.s[block * static_cast<size_t>(g.params())];
      expected[block * params] += of_alpha * row.alpha[i] / d;
      expected[block * params + sub] += of_alpha * 2 * d;
    }
    for (size_t p = 0; p < got.size(); ++p) {
      INFO(name << ", parameter " << p);
      // Float32 rounds a few dozen terms of up to 30 each.
      REQUIRE(std::abs(got[p] - expected[p]) <= 1e-3 * (params == 1 ? 0.1 : 1.0));
    }
  }
}

TEST_CASE("zeros, and what is not finite") {
  for (const std::string& name : kHolding) {
    const grid::Grid& g = grid::find(name);
    const int64_t n = g.info().block;
    Row w = qat::test::filled(n, 0.0F);
    Row free(static_cast<size_t>(grid::seq_params(g)), 1.0F);
    Row s(static_cast<size_t>(g.params())), w_hat(w.size());
    REQUIRE(grid::seq_start(g, w.data(), n, free.data()) == grid::Status::kOk);
    REQUIRE(free == Row(free.size(), 0.0F));
    grid::seq_tie(g, free.data(), n, s.data());
    REQUIRE(g.fake_quantize_with(w.data(), n, s.data(), w_hat.data()) == grid::Status::kOk);
    REQUIRE(w_hat == w);
    w.back() = qat::test::kInf;
    REQUIRE(grid::seq_start(g, w.data(), n, free.data()) == grid::Status::kNotFinite);
  }
}

TEST_CASE("the search does no worse than the start in any block, and about as well as a dense scan") {
  std::mt19937 generator(43);
  for (const std::string& name : kHolding) {
    const grid::Grid& g = grid::find(name);
    const int64_t block = g.info().block, n = 40 * block;
    const Row w = qat::test::random_row(generator, n, -3);
    const auto params = static_cast<size_t>(grid::seq_params(g));
    Row start(static_cast<size_t>(g.blocks(n)) * params), found(start), s(static_cast<size_t>(g.params()));
    REQUIRE(grid::seq_start(g, w.data(), n, start.data()) == grid::Status::kOk);
    REQUIRE(grid::seq_search(g, w.data(), n, found.data()) == grid::Status::kOk);
    Row w_hat(static_cast<size_t>(block));
    double by_search = 0, by_scan = 0;
    for (int64_t b = 0; b < g.blocks(n); ++b) {
      const float* of = w.data() + b * block;
      const auto error = [&](const float* free) {
        grid::seq_tie(g, free, block, s.data());
        REQUIRE(g.fake_quantize_with(of, block, s.data(), w_hat.data()) == grid::Status::kOk);
        double sum = 0;
        for (int64_t i = 0; i < block; ++i) sum += std::pow(static_cast<double>(of[i]) - w_hat[i], 2);
        return sum;
      };
      const size_t first = static_cast<size_t>(b) * params;
      const double least = error(found.data() + first);
      INFO(name << ", block " << b);
      REQUIRE(least <= error(start.data() + first));
      double scanned = least;
      for (int step = 60; step < 280 && params == 1; ++step) {
        const float alpha = start[first] * static_cast<float>(step) / 200.0F;
        scanned = std::min(scanned, error(&alpha));
      }
      by_search += least;
      by_scan += scanned;
    }
    // Between two rungs of the ladder a little is lost where the fits do not lead to the best.
    REQUIRE(by_search <= 1.02 * by_scan);
  }
}

TEST_CASE("the search weighs errors by importance") {
  const grid::Grid& g = grid::find("mlx2_g32");
  std::mt19937 generator(44);
  Row w = qat::test::random_row(generator, 32, 0);
  w[7] = 4.0F * *std::ranges::max_element(w);
  std::vector<double> importance(32, 1e-6);
  importance[7] = 1.0;
  float alike = 0, free = 0;
  REQUIRE(grid::seq_search(g, w.data(), 32, &alike) == grid::Status::kOk);
  REQUIRE(grid::seq_search(g, w.data(), 32, &free, importance.data()) == grid::Status::kOk);
  // The weight that counts is the outermost level, 3/4 alpha.
  REQUIRE(std::abs(0.75F * free / w[7] - 1.0F) < 1e-2F);
  REQUIRE(std::abs(0.75F * free / w[7] - 1.0F) < std::abs(0.75F * alike / w[7] - 1.0F));
}

TEST_CASE("tied scales lead back to free parameters") {
  std::mt19937 generator(45);
  for (const std::string& name : kHolding) {
    const grid::Grid& g = grid::find(name);
    const Tied row = tied(g, generator, -1);
    const auto n = static_cast<int64_t>(row.w.size());
    Row free(row.free.size()), s(row.s.size());
    grid::seq_untie(g, row.s.data(), n, free.data());
    grid::seq_tie(g, free.data(), n, s.data());
    REQUIRE(s == row.s);
  }
}
