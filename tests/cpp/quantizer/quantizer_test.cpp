#include "qat/quantizer/quantizer.hpp"

#include <ATen/ops/embedding.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/ops/ops.hpp"

namespace {

const qat::Estimator kClipped{qat::EstimatorKind::kClippedSte};

}  // namespace

TEST_CASE("a quantizer refuses an unknown grid at once") {
  REQUIRE_THROWS_AS(qat::Quantizer("w", {"q4_9"}, {}), qat::ArgumentError);
}

TEST_CASE("a quantizer applies its scheme and estimator, and names its tensor") {
  const qat::Quantizer quantizer("mlp.up", {"int2_channel"}, kClipped);
  REQUIRE(quantizer.tensor() == "mlp.up");
  REQUIRE(quantizer.scheme().weight == "int2_channel");
  REQUIRE(quantizer.estimator() == kClipped);

  const at::Tensor latent = at::randn({8, 16}).requires_grad_();
  quantizer.fake_quantize(latent).sum().backward();
  const at::Tensor through_quantizer = latent.grad().clone();
  latent.mutable_grad().zero_();
  qat::ops::fake_quantize(latent, "int2_channel", {qat::EstimatorKind::kClippedSte}).sum().backward();
  REQUIRE(at::equal(through_quantizer, latent.grad()));
  REQUIRE(through_quantizer.min().item<float>() == 0.0F);

  const at::Tensor w_hat = qat::ops::fake_quantize(latent, "int2_channel");
  const at::Tensor x = at::randn({3, 16});
  const at::Tensor bias = at::randn({8});
  REQUIRE(at::equal(quantizer.linear(x, latent, bias), at::linear(x, w_hat, bias)));
  const at::Tensor indices = at::tensor({7, 7, 1}, at::kLong);
  REQUIRE(at::equal(quantizer.embedding(indices, latent), w_hat.index_select(0, indices)));
  REQUIRE_THROWS_WITH(quantizer.linear(x.slice(1, 0, 8), latent, {}), Catch::Contains("mlp.up"));
}

TEST_CASE("a padding row learns nothing, on or off") {
  qat::Quantizer quantizer("table", {"q8_0"}, {});
  const at::Tensor indices = at::tensor({2, 0}, at::kLong);
  for (const bool enabled : {true, false}) {
    quantizer.set_enabled(enabled);
    const at::Tensor latent = at::randn({4, 32}).requires_grad_();
    quantizer.embedding(indices, latent, 2).sum().backward();
    REQUIRE(latent.grad()[0].sum().item<float>() == 32.0F);
    REQUIRE(latent.grad()[2].sum().item<float>() == 0.0F);
  }
}

TEST_CASE("a disabled quantizer is the float layer") {
  qat::Quantizer quantizer("w", {"q4_0"}, {});
  quantizer.set_enabled(false);
  REQUIRE_FALSE(quantizer.enabled());
  const at::Tensor latent = at::randn({8, 32});
  const at::Tensor x = at::randn({3, 32});
  const at::Tensor bias = at::randn({8});
  REQUIRE(quantizer.fake_quantize(latent).is_same(latent));
  REQUIRE(at::equal(quantizer.linear(x, latent, bias), at::linear(x, latent, bias)));
  const at::Tensor indices = at::tensor({1}, at::kLong);
  REQUIRE(at::equal(quantizer.embedding(indices, latent), latent.index_select(0, indices)));

  const at::Tensor low = x.to(at::kBFloat16);
  const at::Tensor y = quantizer.linear(low, latent, bias);
  REQUIRE(at::equal(y, at::linear(low, latent.to(at::kBFloat16), bias.to(at::kBFloat16))));
}
