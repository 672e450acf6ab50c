#include "qat/ops/ops.hpp"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>
#include <thread>

#include "catch.hpp"
#include "qat/core/error.hpp"

namespace {

at::Tensor leaf(at::IntArrayRef shape) {
  return at::randn(shape).requires_grad_();
}

}  // namespace

TEST_CASE("operators run from C++ with nothing else in the process") {
  at::manual_seed(0);
  const at::Tensor x = leaf({3, 64});
  const at::Tensor weight = leaf({48, 64});
  const at::Tensor bias = leaf({48});
  const at::Tensor w_hat = qat::ops::fake_quantize(weight, "q4_0").detach();

  const at::Tensor y = qat::ops::quantized_linear(x, weight, bias, "q4_0");
  REQUIRE(at::equal(y, at::linear(x, w_hat, bias)));
  y.sum().backward();
  const at::Tensor ones = at::ones_like(y);
  REQUIRE(at::equal(x.grad(), ones.detach().matmul(w_hat)));
  REQUIRE(at::equal(weight.grad(), ones.detach().t().matmul(x.detach())));
  REQUIRE(at::equal(bias.grad(), ones.detach().sum(0)));

  const at::Tensor indices = at::tensor({5, 0, 5}, at::kLong);
  REQUIRE(
      at::equal(qat::ops::quantized_embedding(indices, weight, -1, "q4_0"), w_hat.index_select(0, indices)));

  const auto [codes, scales] = qat::ops::quantize(weight, "q4_0");
  REQUIRE_FALSE(scales.requires_grad());
  REQUIRE(at::equal(qat::ops::dequantize(codes, scales, "q4_0"), w_hat));
}

TEST_CASE("errors keep their type on the way through the dispatcher") {
  const at::Tensor weight = at::randn({4, 64});
  REQUIRE_THROWS_AS(qat::ops::fake_quantize(weight, "q9"), qat::ArgumentError);
  REQUIRE_THROWS_AS(qat::ops::check_grid("q9"), qat::ArgumentError);
  weight[2][63] = std::numeric_limits<float>::quiet_NaN();
  REQUIRE_THROWS_AS(qat::ops::fake_quantize(weight, "q4_0"), qat::NumericError);
  REQUIRE_THROWS_WITH(qat::ops::quantized_linear(weight, weight, {}, "q8_0", {}, "up.weight"),
                      "quantized_linear: up.weight: row 2 is not finite");
}

TEST_CASE("an estimator is the enumeration's, by value") {
  // d = 1/8: 0.99 lies beyond code 7, the least code -8 is -1.
  const at::Tensor weight = at::randn({1, 32}) * 0.01;
  weight[0][0] = -1.0;
  weight[0][1] = 0.99;
  for (const auto kind : {qat::EstimatorKind::kSte, qat::EstimatorKind::kClippedSte}) {
    const at::Tensor latent = weight.clone().requires_grad_();
    qat::ops::fake_quantize(latent, "q4_0", {kind}).sum().backward();
    REQUIRE(latent.grad()[0][0].item<float>() == 1.0F);
    REQUIRE(latent.grad()[0][1].item<float>() == (kind == qat::EstimatorKind::kSte ? 1.0F : 0.0F));
  }
}

TEST_CASE("double backward is refused") {
  const at::Tensor x = leaf({3, 64});
  const at::Tensor weight = leaf({48, 64});
  const at::Tensor y = qat::ops::quantized_linear(x, weight, {}, "q4_0").square().sum();
  const auto grads = torch::autograd::grad({y}, {x}, {}, true, true);
  REQUIRE_THROWS_WITH(
      grads[0].sum().backward(),
      Catch::Contains("derivative for libqat::quantized_linear_grad_input is not implemented"));
}

TEST_CASE("threads do not share scratch memory") {
  const at::Tensor x = at::randn({4, 256});
  const at::Tensor first = at::randn({256, 256});
  const at::Tensor second = at::randn({512, 256});
  const auto expected = [&](const at::Tensor& weight) {
    return at::linear(x, qat::ops::fake_quantize(weight, "q8_0"));
  };
  const at::Tensor first_expected = expected(first);
  const at::Tensor second_expected = expected(second);
  bool first_equal = true;
  bool second_equal = true;
  const auto repeat = [&x](const at::Tensor& weight, const at::Tensor& wanted, bool& equal) {
    for (int i = 0; i < 50; ++i) {
      equal &= at::equal(qat::ops::quantized_linear(x, weight, {}, "q8_0"), wanted);
    }
  };
  std::thread other([&] { repeat(first, first_expected, first_equal); });
  repeat(second, second_expected, second_equal);
  other.join();
  REQUIRE(first_equal);
  REQUIRE(second_equal);
}
