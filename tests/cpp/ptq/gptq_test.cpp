#include "qat/ptq/gptq.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>

#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/ops/quantize.hpp"
#include "qat/ptq/weighted_search.hpp"

#include "catch.hpp"
#include "decoded.hpp"

using namespace qat;

namespace {

at::Generator seeded(uint64_t seed) {
  return at::detail::createCPUGenerator(seed);
}

}  // namespace

TEST_CASE("with independent inputs GPTQ rounds to nearest") {
  const at::Tensor weight = at::randn({5, 64}, seeded(1)) * 0.05;
  const at::Tensor hessian = at::diag(at::rand({64}, seeded(2)) + 0.1);
  ptq::GptqOptions options;
  options.scale = ptq::ScaleSource::kReference;
  const ptq::Solution solution = ptq::gptq(weight, hessian, "q4_0", options);
  const auto [codes, scales] = ops::quantize(weight, "q4_0");
  CHECK(at::equal(decoded(solution, "q4_0"), ops::dequantize(codes, scales, "q4_0")));
}

TEST_CASE("GPTQ keeps a layer's outputs better than rounding to nearest") {
  const at::Tensor weight = at::randn({16, 128}, seeded(1)) * 0.05;
  const at::Tensor x = at::matmul(at::randn({400, 128}, seeded(2)), at::randn({128, 128}, seeded(3)));
  const at::Tensor hessian = at::matmul(x.t(), x) / 400;
  const auto error = [&](const at::Tensor& w_hat) {
    const at::Tensor outputs = at::matmul(x, (weight - w_hat).t());
    return (outputs * outputs).mean().item<double>();
  };
  for (const char* grid : {"q4_0", "int4_g32", "mlx4_g32", "int4_channel"}) {
    const ptq::Solution solution = ptq::gptq(weight, hessian, grid);
    const at::Tensor scales = ptq::weighted_search(weight, hessian.diagonal(), grid);
    CHECK(error(decoded(solution, grid)) < 0.7 * error(decoded({weight, scales}, grid)));
  }
}

TEST_CASE("GPTQ names the weight and what is wrong with it") {
  const at::Tensor weight = at::randn({2, 32}, seeded(1));
  CHECK_THROWS_WITH(ptq::gptq(weight, at::eye(32) * NAN, "q4_0", {}, "up.weight"),
                    "gptq: up.weight: expected a finite hessian, got NaN or infinity");
  CHECK_THROWS_AS(ptq::gptq(weight, at::eye(31), "q4_0"), ArgumentError);
  CHECK_THROWS_AS(ptq::gptq(weight, at::eye(32), "f16"), ArgumentError);
  CHECK_THROWS_AS(ptq::gptq(weight, 2.0 - at::eye(32), "q4_0"), NumericError);
}

TEST_CASE("scale sources have names") {
  for (const char* name : {"reference", "search", "weighted"}) {
    CHECK(ptq::to_string(ptq::scale_source(name)) == name);
  }
  CHECK_THROWS_AS(ptq::scale_source("best"), ArgumentError);
}
