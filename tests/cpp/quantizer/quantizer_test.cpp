#include "qat/quantizer/quantizer.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>

#include <limits>
#include <vector>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/ops/ops.hpp"

namespace {

const qat::Estimator kClipped{qat::EstimatorKind::kClippedSte};
const qat::Estimator kLsq{qat::EstimatorKind::kClippedSte, qat::ScaleRule::kLearned};
const qat::Estimator kSeq{qat::EstimatorKind::kClippedSte, qat::ScaleRule::kSeq};

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

TEST_CASE("learned scales start at a rule's bits, and are a leaf that every layer differentiates") {
  at::manual_seed(1);
  const at::Tensor latent = at::randn({8, 64}).requires_grad_();
  for (const auto rule : {qat::ScaleRule::kReference, qat::ScaleRule::kSearch}) {
    qat::Quantizer quantizer("w", {"q4_0"}, kLsq);
    REQUIRE(quantizer.learned());
    REQUIRE_FALSE(quantizer.scales().defined());
    quantizer.initialize_scales(latent, rule);
    REQUIRE(quantizer.scales().sizes() == at::IntArrayRef({8, 2, 1}));
    REQUIRE(quantizer.scales().is_leaf());
    REQUIRE(quantizer.scales().requires_grad());
    const at::Tensor w_hat = qat::ops::fake_quantize(latent.detach(), "q4_0", {kLsq.kind, rule});
    REQUIRE(at::equal(quantizer.fake_quantize(latent), w_hat));
    REQUIRE(at::equal(quantizer.weight(latent, at::kFloat), w_hat));
    REQUIRE(at::equal(quantizer.weight(latent, at::kBFloat16), w_hat.to(at::kBFloat16)));
    const at::Tensor x = at::randn({3, 64});
    REQUIRE(at::equal(quantizer.linear(x, latent, {}), at::linear(x, w_hat)));
    const at::Tensor indices = at::tensor({7, 0, 7}, at::kLong);
    REQUIRE(at::equal(quantizer.embedding(indices, latent), w_hat.index_select(0, indices)));
    const auto [codes, stored] = quantizer.quantize(latent);
    REQUIRE(at::equal(qat::ops::dequantize(codes, stored, "q4_0"), w_hat));

    quantizer.embedding(indices, latent).sum().backward();
    const at::Tensor by_embedding = quantizer.scales().grad().clone();
    REQUIRE(by_embedding[1].abs().sum().item<float>() == 0.0F);  // no index names row 1
    quantizer.scales().mutable_grad() = at::Tensor();
    latent.mutable_grad() = at::Tensor();
    const at::Tensor counts = at::tensor({1.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F, 2.0F}).view({8, 1});
    (quantizer.fake_quantize(latent) * counts).sum().backward();
    REQUIRE(at::equal(quantizer.scales().grad(), by_embedding));
    const auto [by_latent, by_scales] = quantizer.weight_backward(counts.expand({8, 64}), latent.detach());
    REQUIRE(at::equal(by_scales, by_embedding));
    REQUIRE(at::equal(by_latent, latent.grad()));
    latent.mutable_grad() = at::Tensor();
  }
}

TEST_CASE("scales that are held still get no gradient, and the latent keeps its own") {
  const at::Tensor latent = at::randn({4, 32}).requires_grad_();
  qat::Quantizer quantizer("w", {"q4_0"}, kLsq);
  quantizer.initialize_scales(latent);
  quantizer.scales().set_requires_grad(false);
  quantizer.linear(at::randn({2, 32}), latent, {}).sum().backward();
  REQUIRE_FALSE(quantizer.scales().grad().defined());
  REQUIRE(latent.grad().defined());
  REQUIRE_FALSE(quantizer.weight_backward(at::randn({4, 32}), latent.detach()).scales.defined());
}

TEST_CASE("set_scales keeps the tensor that an optimizer holds, and refuses what does not fit") {
  const at::Tensor latent = at::randn({4, 64});
  qat::Quantizer quantizer("up.weight", {"q4_1"}, kLsq);
  REQUIRE_THROWS_WITH(quantizer.linear(latent, latent, {}), Catch::Contains("up.weight: expected scales"));
  const at::Tensor start = qat::ops::choose_scales(latent, "q4_1", qat::ScaleRule::kReference);
  quantizer.set_scales(start);
  const at::Tensor held = quantizer.scales();
  REQUIRE_FALSE(held.is_same(start));
  quantizer.set_scales(start * -2.0);
  REQUIRE(quantizer.scales().is_same(held));
  REQUIRE(at::equal(held, start * -2.0));
  const auto refused = [&](const at::Tensor& scales) {
    REQUIRE_THROWS_AS(quantizer.set_scales(scales), qat::ArgumentError);
    REQUIRE_THROWS_WITH(quantizer.set_scales(scales), Catch::StartsWith("set_scales: up.weight: expected "));
    REQUIRE(at::equal(quantizer.scales(), start * -2.0));
  };
  refused({});
  refused(start.to(at::kDouble));
  refused(start.slice(0, 0, 3));
  refused(start.slice(2, 0, 1));
  refused(start / 0.0);
  refused(start * std::numeric_limits<float>::quiet_NaN());
  qat::Quantizer by_rule("w", {"q4_1"}, kClipped);
  REQUIRE_THROWS_WITH(by_rule.set_scales(start),
                      "set_scales: w: expected a quantizer with learned scales, got scale rule reference on "
                      "q4_1");
  by_rule.initialize_scales(latent);  // does nothing
  REQUIRE_FALSE(by_rule.scales().defined());
}

TEST_CASE("a float grid has no scales to learn") {
  qat::Quantizer quantizer("w", {"bf16"}, kLsq);
  const at::Tensor latent = at::randn({4, 32}).requires_grad_();
  quantizer.initialize_scales(latent);
  REQUIRE_FALSE(quantizer.learned());
  REQUIRE_FALSE(quantizer.scales().defined());
  const at::Tensor w_hat = quantizer.fake_quantize(latent);
  REQUIRE(at::equal(w_hat, latent.to(at::kBFloat16).to(at::kFloat)));
  w_hat.sum().backward();
  REQUIRE(latent.grad().sum().item<float>() == 128.0F);
}

TEST_CASE("the blend mixes the float and the quantized layer, gradients too") {
  at::manual_seed(2);
  qat::Quantizer quantizer("w", {"int2_channel"}, kLsq);
  const at::Tensor latent = at::randn({8, 16}).requires_grad_();
  quantizer.initialize_scales(latent, qat::ScaleRule::kReference);
  const at::Tensor x = at::randn({3, 16});
  const at::Tensor quantized = quantizer.linear(x, latent, {}).detach();
  const at::Tensor as_float = at::linear(x, latent).detach();
  quantizer.set_blend(0.25);
  REQUIRE(quantizer.blend() == 0.25);
  // lerp rounds once or twice: 1e-6 is some steps of float32 at these magnitudes
  REQUIRE(at::allclose(quantizer.linear(x, latent, {}), as_float * 0.75 + quantized * 0.25, 1e-6, 1e-6));
  quantizer.fake_quantize(latent).sum().backward();
  const at::Tensor mixed = latent.grad().clone(), mixed_scales = quantizer.scales().grad().clone();
  latent.mutable_grad() = at::Tensor();
  quantizer.scales().mutable_grad() = at::Tensor();
  quantizer.set_blend(1.0);
  quantizer.fake_quantize(latent).sum().backward();
  REQUIRE(at::allclose(mixed, latent.grad() * 0.25 + 0.75, 1e-6, 1e-6));
  REQUIRE(at::allclose(mixed_scales, quantizer.scales().grad() * 0.25, 1e-6, 1e-6));
  REQUIRE(at::equal(quantizer.linear(x, latent, {}), quantized));
  quantizer.set_blend(0.0);
  REQUIRE(at::equal(quantizer.linear(x, latent, {}), as_float));
  REQUIRE(quantizer.fake_quantize(latent).is_same(latent));
  REQUIRE(at::equal(at::linear(x, quantizer.weight(latent, at::kFloat)), quantized));
  for (const double bad : {-0.1, 1.1, std::numeric_limits<double>::quiet_NaN()}) {
    REQUIRE_THROWS_AS(quantizer.set_blend(bad), qat::ArgumentError);
  }
  REQUIRE(quantizer.blend() == 0.0);
}

TEST_CASE("a training grid stands in for the scheme's until it is taken back") {
  const at::Tensor latent = at::randn({4, 64}).requires_grad_();
  qat::Quantizer plain("w", {"q2_0"}, {});
  plain.set_training_grid("q8_0");
  REQUIRE(plain.training_grid() == "q8_0");
  REQUIRE(at::equal(plain.fake_quantize(latent), qat::ops::fake_quantize(latent, "q8_0")));
  REQUIRE(plain.scheme().weight == "q2_0");
  plain.set_training_grid("q2_0");
  REQUIRE(plain.training_grid().empty());
  REQUIRE_THROWS_AS(plain.set_training_grid("q9"), qat::ArgumentError);
  REQUIRE(plain.training_grid().empty());

  qat::Quantizer learned("w", {"q2_0"}, kLsq);
  learned.initialize_scales(latent);
  const at::Tensor before = learned.scales().detach().clone();
  REQUIRE_THROWS_WITH(learned.set_training_grid("q8_0"), Catch::Contains("w: expected the latent"));
  REQUIRE(learned.training_grid().empty());
  learned.set_training_grid("q8_0", latent);
  REQUIRE(learned.scales().sizes() == at::IntArrayRef({4, 2, 1}));
  REQUIRE(learned.scales().requires_grad());
  REQUIRE(at::equal(learned.fake_quantize(latent),
                    qat::ops::fake_quantize(latent, "q8_0", {kLsq.kind, qat::ScaleRule::kSearch})));
  learned.set_training_grid("bf16", latent);
  REQUIRE_FALSE(learned.learned());
  learned.set_training_grid("", latent);
  REQUIRE(at::equal(learned.scales(), before));
}

TEST_CASE("SEQ's parameters are what is learned, and every way to the gradient goes through their tie") {
  for (const std::string grid : {"mlx2_g32", "q2_k"}) {
    const int64_t free = grid == "q2_k" ? 17 : 1, blocks = grid == "q2_k" ? 1 : 8;
    const at::Tensor latent = at::randn({6, 256}).requires_grad_(), x = at::randn({3, 256});
    qat::Quantizer quantizer("w", {grid}, kSeq);
    REQUIRE(quantizer.tied());
    quantizer.initialize_scales(latent, qat::ScaleRule::kReference);
    REQUIRE(quantizer.scales().sizes() == at::IntArrayRef({6, blocks, free}));
    REQUIRE(at::equal(quantizer.scales(),
                      qat::ops::seq_start(latent.detach(), grid, qat::ScaleRule::kReference)));
    quantizer.set_scales(quantizer.scales().detach() * 0.8);
    const at::Tensor scales = quantizer.field_scales().detach();
    REQUIRE(at::equal(scales, qat::ops::seq_tie(quantizer.scales().detach(), grid)));
    const at::Tensor w_hat = qat::ops::fake_quantize(latent.detach(), grid, kLsq, "w", scales);
    REQUIRE(at::equal(quantizer.fake_quantize(latent), w_hat));
    REQUIRE(at::equal(quantizer.weight(latent, at::kBFloat16), w_hat.to(at::kBFloat16)));
    REQUIRE(at::equal(quantizer.linear(x, latent, {}), at::linear(x, w_hat)));
    const at::Tensor indices = at::tensor({5, 0, 5}, at::kLong);
    REQUIRE(at::equal(quantizer.embedding(indices, latent), w_hat.index_select(0, indices)));
    const auto [codes, stored] = quantizer.quantize(latent.detach());
    REQUIRE(at::equal(qat::ops::dequantize(codes, stored, grid), w_hat));

    const at::Tensor grad = at::randn({6, 256});
    const auto [by_latent, by_scales] =
        qat::ops::fake_quantize_backward_scales(grad, latent.detach(), scales, grid, kLsq);
    const at::Tensor by_free = qat::ops::seq_tie_backward(by_scales, grid);
    quantizer.fake_quantize(latent).backward(grad);
    REQUIRE(at::equal(latent.grad(), by_latent));
    REQUIRE(at::equal(quantizer.scales().grad(), by_free));
    const qat::WeightGradients direct = quantizer.weight_backward(grad, latent.detach());
    REQUIRE(at::equal(direct.latent, by_latent));
    REQUIRE(at::equal(direct.scales, by_free));

    quantizer.set_field_scales(scales);
    REQUIRE(at::equal(quantizer.field_scales(), scales));
    REQUIRE_THROWS_WITH(quantizer.set_field_scales(qat::ops::choose_scales(latent.detach(), grid)),
                        Catch::Contains("w: expected scales that are tied"));
    REQUIRE_THROWS_WITH(quantizer.set_scales(scales), Catch::Contains("set_scales: w: expected float32"));
    REQUIRE(at::equal(quantizer.clone()->fake_quantize(latent), quantizer.fake_quantize(latent)));

    quantizer.set_training_grid("q8_0", latent);
    REQUIRE_FALSE(quantizer.tied());
    REQUIRE(quantizer.learned());
    REQUIRE(at::equal(quantizer.fake_quantize(latent),
                      qat::ops::fake_quantize(latent, "q8_0", {kSeq.kind, qat::ScaleRule::kSearch})));
    quantizer.set_training_grid("mlx4_g32", latent);
    REQUIRE(quantizer.tied());
    quantizer.set_training_grid("", latent);
    REQUIRE(at::equal(quantizer.scales(), qat::ops::seq_start(latent.detach(), grid)));
  }
  REQUIRE_THROWS_WITH(qat::Quantizer("w", {"q4_0"}, kSeq),
                      Catch::Contains("w: expected a grid that holds SEQ"));
  REQUIRE_FALSE(qat::Quantizer("w", {"bf16"}, kSeq).learned());
}

TEST_CASE("the input hook sees what the layer multiplies, on or off, and a clone has none") {
  qat::Quantizer quantizer("w", {"q4_0"}, kLsq);
  const at::Tensor latent = at::randn({4, 32}), x = at::randn({2, 3, 32});
  quantizer.initialize_scales(latent);
  std::vector<at::Tensor> seen;
  quantizer.set_input_hook([&](const at::Tensor& input) { seen.push_back(input); });
  quantizer.linear(x, latent, {});
  quantizer.set_enabled(false);
  quantizer.linear(x, latent, {});
  REQUIRE(seen.size() == 2);
  REQUIRE(seen[0].is_same(x));
  const auto copy = quantizer.clone();
  copy->linear(x, latent, {});
  REQUIRE(seen.size() == 2);
  REQUIRE_FALSE(copy->enabled());
  REQUIRE_FALSE(copy->scales().is_same(quantizer.scales()));
  REQUIRE(at::equal(copy->scales(), quantizer.scales()));
  REQUIRE(copy->scales().requires_grad());
  quantizer.set_input_hook(nullptr);
  quantizer.linear(x, latent, {});
  REQUIRE(seen.size() == 2);
}

TEST_CASE("the output hook sees the rows that an embedding returns, on or off, and a clone has none") {
  qat::Quantizer quantizer("w", {"q4_0"}, kLsq);
  const at::Tensor latent = at::randn({4, 32}), indices = at::tensor({3, 0, 3}, at::kLong);
  quantizer.initialize_scales(latent);
  std::vector<at::Tensor> seen;
  quantizer.set_output_hook([&](const at::Tensor& rows) { seen.push_back(rows); });
  const at::Tensor on = quantizer.embedding(indices, latent);
  quantizer.set_enabled(false);
  const at::Tensor off = quantizer.embedding(indices, latent);
  quantizer.clone()->embedding(indices, latent);
  REQUIRE(seen.size() == 2);
  REQUIRE(seen[0].is_same(on));
  REQUIRE(seen[1].is_same(off));
  quantizer.set_output_hook(nullptr);
  quantizer.embedding(indices, latent);
  REQUIRE(seen.size() == 2);
}
