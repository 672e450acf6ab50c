#include <ATen/Context.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <optional>

#include "catch.hpp"
#include "qat/nn/embedding.hpp"
#include "qat/nn/linear.hpp"
#include "qat/nn/without_initialization.hpp"
#include "qat/ops/ops.hpp"

namespace {

std::shared_ptr<qat::Quantizer> q8_0() {
  return std::make_shared<qat::Quantizer>("w", qat::Scheme{"q8_0"}, qat::Estimator{});
}

}  // namespace

TEST_CASE("the layers start as LibTorch's do") {
  at::manual_seed(7);
  torch::nn::Linear float_linear(32, 8);
  torch::nn::Embedding float_embedding(16, 32);
  at::manual_seed(7);
  qat::nn::Linear linear(32, 8);
  qat::nn::Embedding embedding(16, 32);
  REQUIRE(at::equal(linear->weight, float_linear->weight));
  REQUIRE(at::equal(linear->bias, float_linear->bias));
  REQUIRE(at::equal(embedding->weight, float_embedding->weight));
  REQUIRE(linear->named_parameters().keys() == float_linear->named_parameters().keys());
  REQUIRE(embedding->named_parameters().keys() == float_embedding->named_parameters().keys());
}

TEST_CASE("without initialization no random number is drawn, on this thread, while the scope lives") {
  const auto drawn = [](bool outer, bool inner) {
    at::manual_seed(4);
    {
      std::optional<qat::nn::WithoutInitialization> first, second;
      if (outer) first.emplace();
      if (inner) second.emplace();
      second.reset();  // ends; an outer one stays
      const qat::nn::Embedding embedding(4, 32);
      const qat::nn::Linear linear(32, 8);
      REQUIRE(embedding->weight.sizes() == at::IntArrayRef({4, 32}));
      REQUIRE(linear->bias.requires_grad());
    }
    const at::Tensor next = at::randn({1});
    at::manual_seed(4);
    return !next.equal(at::randn({1}));
  };
  REQUIRE(drawn(false, false));
  REQUIRE(drawn(false, true));
  REQUIRE_FALSE(drawn(true, false));
  REQUIRE_FALSE(drawn(true, true));
}

TEST_CASE("without a quantizer they are the float layers") {
  qat::nn::Linear linear(32, 8);
  qat::nn::Linear bare(32, 8, false);
  qat::nn::Embedding embedding(16, 32);
  const at::Tensor x = at::randn({2, 3, 32});
  const at::Tensor indices = at::tensor({3, 15}, at::kLong);
  REQUIRE(at::equal(linear->forward(x), at::linear(x, linear->weight, linear->bias)));
  REQUIRE(at::equal(bare->forward(x), at::linear(x, bare->weight)));
  REQUIRE_FALSE(bare->bias.defined());
  REQUIRE(at::equal(embedding->forward(indices), embedding->weight.index_select(0, indices)));
  REQUIRE(linear->forward(x.to(at::kBFloat16)).scalar_type() == at::kBFloat16);
}

TEST_CASE("with a quantizer they run on its grid and train the latent") {
  qat::nn::Linear linear(32, 8);
  qat::nn::Embedding embedding(16, 32);
  linear->quantizer = q8_0();
  embedding->quantizer = q8_0();
  const at::Tensor x = at::randn({2, 3, 32});
  const at::Tensor indices = at::tensor({3, 15}, at::kLong);
  const at::Tensor y = linear->forward(x);
  REQUIRE(at::equal(y, at::linear(x, qat::ops::fake_quantize(linear->weight, "q8_0"), linear->bias)));
  REQUIRE_FALSE(at::equal(y, at::linear(x, linear->weight, linear->bias)));
  const at::Tensor rows = embedding->forward(indices);
  REQUIRE(at::equal(rows, qat::ops::fake_quantize(embedding->weight, "q8_0").index_select(0, indices)));
  (y.sum() + rows.sum()).backward();
  REQUIRE(linear->weight.grad().defined());
  REQUIRE(linear->bias.grad().defined());
  REQUIRE(embedding->weight.grad().defined());
}

TEST_CASE("a clone shares neither latents nor quantizer") {
  qat::nn::Linear linear(32, 8);
  qat::nn::Embedding embedding(16, 32);
  linear->quantizer = q8_0();
  embedding->quantizer = q8_0();
  const auto linear_copy = std::dynamic_pointer_cast<qat::nn::LinearImpl>(linear->clone());
  const auto embedding_copy = std::dynamic_pointer_cast<qat::nn::EmbeddingImpl>(embedding->clone());
  REQUIRE(at::equal(linear_copy->weight, linear->weight));
  REQUIRE_FALSE(linear_copy->weight.is_alias_of(linear->weight));
  REQUIRE(at::equal(embedding_copy->weight, embedding->weight));
  linear_copy->quantizer->set_enabled(false);
  embedding_copy->quantizer->set_enabled(false);
  REQUIRE(linear->quantizer->enabled());
  REQUIRE(embedding->quantizer->enabled());
}
