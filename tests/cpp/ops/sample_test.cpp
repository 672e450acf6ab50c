#include "qat/ops/sample.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "catch.hpp"
#include "qat/core/error.hpp"

using qat::sample;

namespace {

at::Tensor uniform(int64_t count, uint64_t seed = 0) {
  return at::rand({count}, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kDouble));
}

}  // namespace

TEST_CASE("every id is drawn with its probability") {
  // Counts of 40,000 draws, within five standard deviations of what the probabilities say.
  const at::Tensor p = at::tensor({0.5, 0.0, 0.3, 0.15, 0.05}, at::kDouble);
  const int64_t n = 40000;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor drawn = sample(p.log().to(dtype).expand({n, -1}), uniform(n));
    const at::Tensor counts = at::bincount(drawn, {}, 5);
    CHECK(counts[1].item<int64_t>() == 0);
    const at::Tensor deviations = 5 * (n * p * (1 - p)).sqrt();
    CHECK(((counts - n * p).abs() <= deviations).all().item<bool>());
  }
}

TEST_CASE("the id is the first whose cumulated probability exceeds the number") {
  const at::Tensor logits = at::tensor({0.25, 0.25, 0.0, 0.5}, at::kDouble).log();
  const at::Tensor numbers = at::tensor({0.0, 0.2, 0.3, 0.4999, 0.5001, 1 - 0x1p-53}, at::kDouble);
  const at::Tensor found = sample(logits.expand({6, -1}), numbers);
  CHECK(at::equal(found, at::tensor({0, 0, 1, 1, 3, 3}, at::kLong)));
  CHECK(sample(at::zeros({2, 1}), uniform(2)).sum().item<int64_t>() == 0);
  CHECK(sample(at::zeros({0, 3}), uniform(0)).numel() == 0);
}

TEST_CASE("rows do not depend on how many are drawn together") {
  const int64_t n = 70, width = 100000;  // more than fits in one part
  const at::Tensor logits = at::randn({n, width}, at::detail::createCPUGenerator(1));
  const at::Tensor numbers = uniform(n), together = sample(logits, numbers);
  for (int64_t row = 0; row < n; row += 23) {
    CHECK(at::equal(sample(logits.narrow(0, row, 1), numbers.narrow(0, row, 1)), together.narrow(0, row, 1)));
  }
}

TEST_CASE("draws are no part of a graph") {
  const at::Tensor logits = at::zeros({2, 3}).set_requires_grad(true);
  CHECK_FALSE(sample(logits, uniform(2)).requires_grad());
}

TEST_CASE("what cannot be drawn from is refused") {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    CHECK_THROWS_AS(sample(at::tensor({0.0, bad}, at::kDouble).view({1, 2}), uniform(1)), qat::NumericError);
  }
  const at::Tensor logits = at::zeros({2, 3});
  CHECK_THROWS_AS(sample(logits, uniform(3)), qat::ArgumentError);
  CHECK_THROWS_AS(sample(logits, uniform(2).to(at::kFloat)), qat::ArgumentError);
  CHECK_THROWS_AS(sample(logits.select(0, 0), uniform(2)), qat::ArgumentError);
  CHECK_THROWS_AS(sample(logits.to(at::kLong), uniform(2)), qat::ArgumentError);
  CHECK_THROWS_AS(sample(at::zeros({2, 0}), uniform(2)), qat::ArgumentError);
}
