// Coordinate descent on rounded matrices, against errors computed in float64.

#include "qat/ptq/refine.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
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

#include <algorithm>
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

/// No code of a q4_0 solution can be moved a step for a lower error(w_hat, row of that code).
template <class Error>
void require_local_optimum(const ptq::Solution& found, const Error& error) {
  const at::Tensor w_hat = decoded(found, "q4_0");
  for (int64_t row = 0; row < w_hat.size(0); ++row) {
    const double least = error(w_hat, row);
    for (int64_t j = 0; j < w_hat.size(1); ++j) {
      const double scale = static_cast<at::Half>(found.scales[row][j / 32][0].item<float>());
      for (const double step : {-scale, scale}) {
        at::Tensor other = w_hat.clone();
        const double code = (other[row][j].item<double>() + step) / scale;
        if (code < -8.5 || code > 7.5) continue;
        other[row][j] += step;
        REQUIRE(error(other, row) >= least * (1 - 1e-6));
      }
    }
  }
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
  require_local_optimum(found, [&](const at::Tensor& w_hat, int64_t row) {
    return errors(weight, w_hat, hessian)[row].item<double>();
  });
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

namespace {

/// G in groups of `size` rows, as in RefineOptions.
at::Tensor output_groups(int64_t rows, int64_t size, uint64_t seed) {
  const int64_t groups = (rows + size - 1) / size;
  at::Tensor g = at::zeros({groups, size, size});
  for (int64_t k = 0; k < groups; ++k) g[k].copy_(correlated(size, seed + 10 * k));
  return g;
}

/// tr(G e (H + damping) e^T) in float64 with both dampings, over all groups.
double coupled_error(const at::Tensor& e32, const at::Tensor& hessian, const at::Tensor& outputs) {
  const at::Tensor e = e32.to(at::kDouble);
  at::Tensor h = hessian.to(at::kDouble).clone();
  h.diagonal().add_(0.01 * h.diagonal().mean().item<double>());
  const int64_t size = outputs.size(1);
  double sum = 0.0;
  for (int64_t k = 0; k < outputs.size(0); ++k) {
    const int64_t count = std::min(size, e.size(0) - k * size);
    at::Tensor g = outputs[k].narrow(0, 0, count).narrow(1, 0, count).to(at::kDouble).clone();
    g.diagonal().add_(0.2 * g.diagonal().mean().item<double>());
    const at::Tensor rows = e.narrow(0, k * size, count);
    sum += (at::mm(g, rows) * at::mm(rows, h)).sum().item<double>();
  }
  return sum;
}

}  // namespace

TEST_CASE("rows that count together make up for each other's errors") {
  const at::Tensor weight = at::randn({70, 128}, seeded(20)) * 0.05;
  const at::Tensor hessian = correlated(128, 21);
  const at::Tensor outputs = output_groups(70, 32, 22);  // the last group has six rows
  for (const char* grid : {"q4_0", "q2_0", "int4_g32", "mlx3_g64@bf16", "mxfp4"}) {
    CAPTURE(grid);
    const ptq::Solution start = ptq::gptq(weight, hessian, grid);
    const ptq::Solution alone = ptq::refine(weight, hessian, grid, start);
    ptq::RefineOptions options;
    double last = coupled_error(weight - decoded(start, grid), hessian, outputs);
    for (int64_t sweeps = 1; sweeps <= 4; ++sweeps) {
      options.sweeps = sweeps;
      options.outputs = outputs;
      const ptq::Solution found = ptq::refine(weight, hessian, grid, start, options);
      const double now = coupled_error(weight - decoded(found, grid), hessian, outputs);
      // float32 sums of 128 x 32 terms err by some 1e-6 of the whole
      REQUIRE(now <= last * (1 + 1e-5));
      last = now;
    }
    REQUIRE(last < 0.9 * coupled_error(weight - decoded(alone, grid), hessian, outputs));
  }
}

TEST_CASE("what rows find together is a local optimum of the codes") {
  const at::Tensor weight = at::randn({6, 64}, seeded(30)) * 0.05;
  const at::Tensor hessian = correlated(64, 31), outputs = output_groups(6, 6, 32);
  ptq::RefineOptions options;
  options.sweeps = 100;
  options.outputs = outputs;
  const ptq::Solution found =
      ptq::refine(weight, hessian, "q4_0", ptq::gptq(weight, hessian, "q4_0"), options);
  require_local_optimum(found, [&](const at::Tensor& w_hat, int64_t) {
    return coupled_error(weight - w_hat, hessian, outputs);
  });
}

TEST_CASE("outputs that count apart are as none, and threads do not matter") {
  const at::Tensor weight = at::randn({40, 128}, seeded(40)) * 0.05;
  const at::Tensor hessian = correlated(128, 41);
  const ptq::Solution start = ptq::gptq(weight, hessian, "q4_0");
  ptq::RefineOptions apart;
  apart.outputs = at::diag(at::rand({40}, seeded(42)) + 0.1).unsqueeze(0);
  const at::Tensor none =
      errors(weight, decoded(ptq::refine(weight, hessian, "q4_0", start), "q4_0"), hessian);
  const at::Tensor found =
      errors(weight, decoded(ptq::refine(weight, hessian, "q4_0", start, apart), "q4_0"), hessian);
  // sums are formed in another order, which decides ties
  REQUIRE(at::allclose(none, found, 1e-3));
  ptq::RefineOptions together;
  together.outputs = output_groups(40, 40, 43);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const ptq::Solution one = ptq::refine(weight, hessian, "q4_0", start, together);
  at::set_num_threads(2);
  const ptq::Solution two = ptq::refine(weight, hessian, "q4_0", start, together);
  at::set_num_threads(threads);
  REQUIRE(at::equal(one.latent, two.latent));
  REQUIRE(at::equal(one.scales, two.scales));
}

TEST_CASE("outputs of another shape are refused by name") {
  const at::Tensor weight = at::randn({40, 64}, seeded(50));
  const at::Tensor hessian = correlated(64, 51);
  const ptq::Solution start = ptq::gptq(weight, hessian, "q4_0");
  ptq::RefineOptions options;
  for (const at::Tensor& outputs : {at::zeros({40, 40}), at::zeros({2, 40, 40}), at::zeros({1, 32, 32}),
                                    at::zeros({1, 40, 40}, at::kDouble)}) {
    options.outputs = outputs;
    REQUIRE_THROWS_WITH(ptq::refine(weight, hessian, "q4_0", start, options, "w"),
                        Catch::Contains("refine: w: expected outputs float32[K, S, S]"));
  }
  options.outputs = at::full({1, 40, 40}, std::numeric_limits<float>::quiet_NaN());
  REQUIRE_THROWS_AS(ptq::refine(weight, hessian, "q4_0", start, options), NumericError);
  options.outputs = at::zeros({1, 40, 40});
  REQUIRE(ptq::refine(weight, hessian, "q4_0", start, options).latent.isfinite().all().item<bool>());
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
