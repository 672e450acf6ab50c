#include "qat/models/decoder.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>

#include <memory>
#include <string>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/nn/embedding.hpp"
#include "qat/nn/linear.hpp"
#include "qat/ops/ops.hpp"

namespace {

using qat::models::Decoder;

qat::models::DecoderConfig small(bool tied) {
  qat::models::DecoderConfig config;
  config.vocab_size = 50;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
  config.tie_word_embeddings = tied;
  return config;
}

/// Binds a q4_0 quantizer to every layer, as `prepare` does; returns how many.
int bind(Decoder& decoder) {
  int bound = 0;
  for (auto& item : decoder.named_modules()) {
    const auto quantizer =
        std::make_shared<qat::Quantizer>(item.key() + ".weight", qat::Scheme{"q4_0"}, qat::Estimator{});
    if (auto* linear = item.value()->as<qat::nn::LinearImpl>()) {
      linear->quantizer = quantizer;
    } else if (auto* embedding = item.value()->as<qat::nn::EmbeddingImpl>()) {
      embedding->quantizer = quantizer;
    } else {
      continue;
    }
    ++bound;
  }
  return bound;
}

/// Another decoder that holds what q4_0 makes of the matrices.
std::shared_ptr<Decoder> quantized_copy(const Decoder& decoder) {
  auto copy = std::make_shared<Decoder>(decoder.config());
  const auto parameters = decoder.named_parameters();
  const at::NoGradGuard no_grad;
  for (auto& item : copy->named_parameters()) {
    const at::Tensor& latent = parameters[item.key()];
    item.value().copy_(latent.dim() > 1 ? qat::ops::fake_quantize(latent, "q4_0") : latent);
  }
  return copy;
}

}  // namespace

TEST_CASE("bound quantizers make the decoder of the quantized weights") {
  for (const bool tied : {true, false}) {
    const auto trained = std::make_shared<Decoder>(small(tied));
    const auto shipped = quantized_copy(*trained);
    REQUIRE(bind(*trained) == 2 * 7 + (tied ? 1 : 2));
    const at::Tensor tokens = at::arange(30).reshape({2, 15});
    // The same products of the same numbers in the same order.
    REQUIRE(at::equal(trained->forward(tokens), shipped->forward(tokens)));
  }
}

TEST_CASE("a tied latent receives the gradients of both of its uses") {
  const auto trained = std::make_shared<Decoder>(small(true));
  const auto shipped = quantized_copy(*trained);
  bind(*trained);
  const at::Tensor tokens = at::arange(30).reshape({2, 15});
  for (const auto& decoder : {trained, shipped}) decoder->forward(tokens).square().mean().backward();
  const auto got = trained->named_parameters(), expected = shipped->named_parameters();
  for (const auto& item : expected) {
    const at::Tensor difference = got[item.key()].grad() - item.value().grad();
    const double scale = item.value().grad().abs().max().item<double>();
    // Straight through: the gradient at w_hat. The embedding's two parts are added in another order.
    REQUIRE(difference.abs().max().item<double>() <= 1e-5 * scale);
  }
}

TEST_CASE("a frozen copy has no quantizers and leaves the original alone") {
  auto decoder = std::make_shared<Decoder>(small(true));
  const at::Tensor tokens = at::arange(30).reshape({2, 15});
  const at::Tensor expected = decoder->forward(tokens);
  bind(*decoder);
  const auto copy = decoder->frozen_copy(at::kFloat);
  REQUIRE(at::equal(copy->forward(tokens), expected));
  REQUIRE_FALSE(at::equal(decoder->forward(tokens), expected));
  for (const at::Tensor& parameter : decoder->parameters()) REQUIRE(parameter.requires_grad());
}

TEST_CASE("float64 weights run through the tensor formulas") {
  auto decoder = std::make_shared<Decoder>(small(false));
  const at::Tensor tokens = at::arange(30).reshape({2, 15});
  const at::Tensor expected = decoder->forward(tokens);
  decoder->to(at::kDouble);
  const at::Tensor logits = decoder->forward(tokens);
  REQUIRE(logits.scalar_type() == at::kDouble);
  // float32 sums of up to 96 terms in two layers.
  REQUIRE((logits - expected).abs().max().item<double>() < 1e-5 * expected.abs().max().item<double>());
}

TEST_CASE("a decoder converted to bfloat16 keeps a float32 residual stream") {
  auto decoder = std::make_shared<Decoder>(small(true));
  const at::Tensor tokens = at::arange(30).reshape({2, 15});
  const at::Tensor expected = decoder->forward(tokens);
  decoder->to(at::kBFloat16);
  const at::Tensor logits = decoder->forward(tokens);
  REQUIRE(logits.scalar_type() == at::kBFloat16);
  // Each of some ten products in a row rounds to 2^-9 of its size.
  const at::Tensor error = logits.to(at::kFloat) - expected;
  REQUIRE(error.norm().item<double>() < 0.03 * expected.norm().item<double>());
}

TEST_CASE("impossible configurations are refused before anything is allocated") {
  auto config = small(true);
  config.num_key_value_heads = 3;
  REQUIRE_THROWS_AS(Decoder(config), qat::ArgumentError);
  config = small(true);
  config.vocab_size = 0;
  REQUIRE_THROWS_AS(Decoder(config), qat::ArgumentError);
}
