// Coordinate descent on rounded matrices, against errors computed in float64.

#include "qat/ptq/refine.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <vector>

#include "catch.hpp"
#include "decoded.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"

using namespace qat;

namespace {

at::Generator seeded(uint64_t seed) {
  return at::detail::createCPUGenerator(seed);
}

/// A second moment with strong correlations.
at::Tensor correlated(int64_t n, uint64_t seed) {
  const at::Tensor x =
      at::mm(at::randn({3 * n, n / 4}, seeded(seed)), at::randn({n / 4, n}, seeded(seed + 1)));
  const at::Tensor noisy = x + 0.5 * at::randn({3 * n, n}, seeded(seed + 2));
  return at::mm(noisy.t(), noisy) / (3.0 * static_cast<double>(n));
}

/// Each row's e^T (H + damping) e in float64, damping a hundredth of the mean diagonal.
at::Tensor errors(const at::Tensor& weight, const at::Tensor& w_hat, const at::Tensor& hessian) {
  const at::Tensor e = (weight - w_hat).to(at::kDouble);
  at::Tensor h = hessian.to(at::kDouble).clone();
  h.diagonal().add_(0.01 * h.diagonal().mean().item<double>());
  return (at::mm(e, h) * e).sum(1);
}

}  // namespace

TEST_CASE("no row gets worse, and most get better") {
  const at::Tensor weight = at::randn({24, 256}, seeded(1)) * 0.05;
  const at::Tensor hessian = correlated(256, 2);
  for (const char* grid :
       {"q4_0", "q4_1", "q2_0", "tq2_0", "int4_g32", "int3_g64", "int2_channel", "mlx3_g64@bf16", "mlx2_g32",
        "mobile4", "q2_k", "q4_k", "mxfp4", "int4_g32_asym"}) {
    CAPTURE(grid);
    const ptq::Solution start = ptq::gptq(weight, hessian, grid);
    const ptq::Solution found = ptq::refine(weight, hessian, grid, start);
    const at::Tensor before = errors(weight, decoded(start, grid), hessian);
    const at::Tensor after = errors(weight, decoded(found, grid), hessian);
    // float32 products of 256 terms err by some 1e-6 of the whole
    REQUIRE((after <= before * (1 + 1e-5)).all().item<bool>());
    REQUIRE(after.sum().item<double>() < 0.995 * before.sum().item<double>());
  }
}

TEST_CASE("what is found is a local optimum of the codes") {
  const at::Tensor weight = at::randn({4, 64}, seeded(3)) * 0.05;
  const at::Tensor hessian = correlated(64, 4);
  ptq::RefineOptions options;
  options.sweeps = 100;
  const ptq::Solution found =
      ptq::refine(weight, hessian, "q4_0", ptq::gptq(weight, hessian, "q4_0"), options);
  const at::Tensor w_hat = decoded(found, "q4_0");
  const at::Tensor least = errors(weight, w_hat, hessian);
  for (int64_t row = 0; row < 4; ++row) {
    for (int64_t j = 0; j < 64; ++j) {
      const double scale = static_cast<at::Half>(found.scales[row][j / 32][0].item<float>());
      for (const double step : {-scale, scale}) {
        at::Tensor other = w_hat.clone();
        const double code = (other[row][j].item<double>() + step) / scale;
        if (code < -8.5 || code > 7.5) continue;
        other[row][j] += step;
        REQUIRE(errors(weight, other, hessian)[row].item<double>() >= least[row].item<double>() * (1 - 1e-6));
      }
    }
  }
}

TEST_CASE("with independent inputs and the best scales nothing is left to do") {
  const at::Tensor weight = at::arange(-8, 8).to(at::kFloat).repeat({3, 4}) * 0.25;
  const at::Tensor hessian = at::diag(at::rand({64}, seeded(5)) + 0.1);
  const ptq::Solution start = ptq::gptq(weight, hessian, "q4_0");
  const ptq::Solution found = ptq::refine(weight, hessian, "q4_0", start);
  REQUIRE(at::equal(decoded(found, "q4_0"), weight));
}

TEST_CASE("threads, sweeps and grids that have nothing to win do not matter") {
  const at::Tensor weight = at::randn({40, 128}, seeded(6)) * 0.05;
  const at::Tensor hessian = correlated(128, 7);
  const ptq::Solution start = ptq::gptq(weight, hessian, "q4_0");
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const ptq::Solution one = ptq::refine(weight, hessian, "q4_0", start);
  at::set_num_threads(2);
  const ptq::Solution two = ptq::refine(weight, hessian, "q4_0", start);
  at::set_num_threads(threads);
  REQUIRE(at::equal(one.latent, two.latent));
  REQUIRE(at::equal(one.scales, two.scales));
  const ptq::Solution none = ptq::refine(weight, hessian, "q4_0", start, {0.01, 0});
  REQUIRE(at::equal(none.latent, start.latent));
  const ptq::Solution wide = ptq::gptq(weight, hessian, "q8_0");
  REQUIRE(at::equal(ptq::refine(weight, hessian, "q8_0", wide).latent, wide.latent));
}

TEST_CASE("dead inputs and empty blocks stay as they are") {
  at::Tensor weight = at::randn({3, 64}, seeded(8)) * 0.05;
  weight[1].slice(0, 0, 32).zero_();
  at::Tensor hessian = correlated(64, 9);
  hessian[5].zero_();
  hessian.select(1, 5).zero_();
  for (const char* grid : {"q4_0", "q2_0", "mlx2_g32"}) {
    const ptq::Solution start = ptq::gptq(weight, hessian, grid);
    const at::Tensor w_hat = decoded(ptq::refine(weight, hessian, grid, start), grid);
    REQUIRE(w_hat.isfinite().all().item<bool>());
  }
}

TEST_CASE("what cannot be refined is refused by name") {
  const at::Tensor weight = at::randn({2, 64}, seeded(10));
  const at::Tensor hessian = correlated(64, 11);
  const ptq::Solution start = ptq::gptq(weight, hessian, "q4_0");
  REQUIRE_THROWS_WITH(ptq::refine(weight, hessian, "q4_0", {}, {}, "w"),
                      Catch::Contains("refine: w: expected a start with latents"));
  REQUIRE_THROWS_WITH(
      ptq::refine(weight, hessian, "q4_0", {start.latent, start.scales.slice(1, 0, 1)}, {}, "w"),
      Catch::Contains("expected a start with the grid's scales"));
  REQUIRE_THROWS_AS(ptq::refine(weight, hessian.slice(0, 0, 32), "q4_0", start), ArgumentError);
  REQUIRE_THROWS_AS(ptq::refine(weight, hessian, "q4_0", start, {-1.0}), ArgumentError);
  REQUIRE_THROWS_AS(ptq::refine(weight, hessian, "q4_0", start, {0.01, -1}), ArgumentError);
  at::Tensor broken = weight.clone();
  broken[1][3] = std::numeric_limits<float>::quiet_NaN();
  REQUIRE_THROWS_AS(ptq::refine(broken, hessian, "q4_0", start), NumericError);
}
