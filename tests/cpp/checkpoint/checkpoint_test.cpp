// Checkpoints in memory: quantizing, reading weights back, freezing a list of tensors.

#include "qat/checkpoint/checkpoint.hpp"

#include <ATen/Context.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "qat/core/error.hpp"
#include "qat/ops/fake_quantize.hpp"

// Catch comes last.
#include "catch.hpp"

namespace {

using qat::ArgumentError;
using qat::Latent;
using qat::Scheme;

at::Tensor random(at::IntArrayRef shape, uint64_t seed = 0) {
  at::manual_seed(seed);
  return at::randn(shape);
}

}  // namespace

TEST_CASE("a quantized tensor decodes to what the forward pass saw, in its own shape") {
  for (const char* grid : {"q4_0", "q4_1", "q8_0", "int8_channel", "int4_channel", "int2_channel", "int4_g64",
                           "int3_g32", "int3_channel", "int2_g32"}) {
    const at::Tensor latent = random({6, 4, 4, 4});
    const qat::QuantizedTensor tensor = qat::quantize_tensor("conv.weight", latent, {grid});
    REQUIRE(tensor.shape == std::vector<int64_t>{6, 4, 4, 4});
    REQUIRE(tensor.codes.sizes() == at::IntArrayRef{6, 64});
    const at::Tensor weight = qat::dequantize_tensor("conv.weight", tensor);
    REQUIRE(weight.sizes() == latent.sizes());
    REQUIRE(at::equal(weight, qat::ops::fake_quantize(latent, grid)));
  }
}

TEST_CASE("a float grid has no codes to make") {
  REQUIRE_THROWS_AS(qat::quantize_tensor("w", random({2, 32}), {"f16"}), ArgumentError);
  REQUIRE_THROWS_AS(qat::quantize_tensor("w", random({2, 32}), {"q9"}), ArgumentError);
}

TEST_CASE("freezing copies: a later step does not reach the checkpoint") {
  at::Tensor weight = random({2, 32});
  at::Tensor bias = at::ones({2});
  const auto checkpoint = qat::freeze_tensors({{"fc.weight", weight, {"q8_0"}}, {"fc.bias", bias, {}}});
  const at::Tensor before = qat::weight_of(checkpoint, "fc.weight").clone();
  weight.zero_();
  bias.zero_();
  REQUIRE(at::equal(qat::weight_of(checkpoint, "fc.weight"), before));
  REQUIRE(at::equal(qat::weight_of(checkpoint, "fc.bias"), at::ones({2})));
}

TEST_CASE("latents that require gradients freeze into plain tensors") {
  const at::Tensor weight = random({2, 32}).requires_grad_();
  const auto checkpoint =
      qat::freeze_tensors({{"a", weight, {"q4_0"}}, {"b", weight, {}}, {"c", weight, {"bf16"}}});
  REQUIRE_FALSE(qat::weight_of(checkpoint, "a").requires_grad());
  REQUIRE_FALSE(checkpoint.floats.at("b").requires_grad());
  REQUIRE_FALSE(checkpoint.floats.at("c").requires_grad());
}

TEST_CASE("f16 and bf16 are stored in their type, f32 keeps whatever dtype there is") {
  const at::Tensor weight = random({2, 32});
  const auto checkpoint = qat::freeze_tensors({{"half", weight, {"f16"}},
                                               {"brain", weight, {"bf16"}},
                                               {"kept", weight.to(at::kBFloat16), {"f32"}},
                                               {"steps", at::full({}, 7, at::kLong), {"f32"}}});
  REQUIRE(checkpoint.floats.at("half").scalar_type() == at::kHalf);
  REQUIRE(at::equal(checkpoint.floats.at("half"), weight.to(at::kHalf)));
  REQUIRE(at::equal(checkpoint.floats.at("brain"), weight.to(at::kBFloat16)));
  REQUIRE(checkpoint.floats.at("kept").scalar_type() == at::kBFloat16);
  REQUIRE(qat::weight_of(checkpoint, "kept").scalar_type() == at::kFloat);
  REQUIRE(qat::weight_of(checkpoint, "steps").scalar_type() == at::kLong);
}

TEST_CASE("an alias reads its target") {
  const auto checkpoint = qat::freeze_tensors({{"embed", random({4, 32}), {"q8_0"}}}, {{"head", "embed"}},
                                              "{}", "tok", "{\"rules\":[]}");
  REQUIRE(at::equal(qat::weight_of(checkpoint, "head"), qat::weight_of(checkpoint, "embed")));
  const auto weights = qat::dequantize(checkpoint);
  REQUIRE(weights.size() == 2);
  REQUIRE(weights[0].name == "embed");
  REQUIRE(weights[1].name == "head");
  REQUIRE(at::equal(weights[0].value, weights[1].value));
  REQUIRE_THROWS_WITH(qat::weight_of(checkpoint, "tail"),
                      "weight_of: tail: expected a tensor of the checkpoint, got none of this name");
}

TEST_CASE("what cannot be frozen is refused by name") {
  const at::Tensor weight = random({4, 32});
  REQUIRE_THROWS_WITH(qat::freeze_tensors({{"w", weight, {"q8_0"}}, {"w", weight, {}}}),
                      "freeze: w: expected each tensor once, got it twice");
  REQUIRE_THROWS_WITH(qat::freeze_tensors({{"w", weight, {}}}, {{"w", "w"}}),
                      "freeze: w: expected an alias or a tensor, got both");
  REQUIRE_THROWS_WITH(qat::freeze_tensors({{"w", weight, {}}}, {{"v", "u"}}),
                      "freeze: v: expected an alias of a tensor, got \"u\", which is none");
  REQUIRE_THROWS_WITH(qat::freeze_tensors({{"w", at::Tensor(), {}}}),
                      "freeze: w: expected a tensor, got none");
  REQUIRE_THROWS_AS(qat::freeze_tensors({{"w", weight, {"q5_9"}}}), ArgumentError);
  REQUIRE_THROWS_AS(qat::freeze_tensors({{"w", weight.to(at::kDouble), {"q8_0"}}}), ArgumentError);
  REQUIRE_THROWS_AS(qat::freeze_tensors({{"w", at::ones({2, 2}, at::kComplexFloat), {}}}), ArgumentError);
}

TEST_CASE("values that have no place on the grid are errors naming the tensor") {
  at::Tensor weight = random({4, 32});
  weight[2][5] = std::numeric_limits<float>::quiet_NaN();
  REQUIRE_THROWS_AS(qat::freeze_tensors({{"blocks.3.up", weight, {"q4_0"}}}), qat::NumericError);
  REQUIRE_THROWS_WITH(qat::freeze_tensors({{"blocks.3.up", weight, {"q4_0"}}}),
                      Catch::Contains("blocks.3.up"));
  REQUIRE_THROWS_AS(qat::freeze_tensors({{"w", at::full({2, 32}, 1e6), {"f16"}}}), qat::NumericError);
}
