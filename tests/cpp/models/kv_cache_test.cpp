#include "qat/models/kv_cache.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/randint.h>

#include "catch.hpp"
#include "qat/core/error.hpp"
#include "qat/models/decoder.hpp"
#include "shapes_of_models.hpp"

using namespace qat;

namespace {

at::Tensor text(int64_t sequences, int64_t length) {
  return at::randint(50, {sequences, length}, at::detail::createCPUGenerator(1),
                     at::TensorOptions().dtype(at::kLong));
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>();
}

// float32 sums of up to 100 terms in another order, through six layers.
constexpr double kRounding = 2e-5;

}  // namespace

TEST_CASE("decoding in pieces of any length gives what one pass gives, for every shape") {
  for (const auto& [name, config] : models::shapes()) {
    INFO(name);
    at::manual_seed(3);
    models::Decoder decoder(config);
    const at::Tensor tokens = text(2, 23);
    const at::Tensor expected = decoder.forward(tokens);
    models::KvCache cache(config);
    int64_t done = 0;
    for (const int64_t length : {9, 1, 1, 6, 1, 1, 1, 3}) {
      const at::Tensor logits = decoder.forward(tokens.narrow(1, done, length), cache);
      CHECK(difference(logits, expected.narrow(1, done, length)) < kRounding);
      done += length;
      CHECK(cache.length() == done);
    }
  }
}

TEST_CASE("layers with a window hold no more than it reaches") {
  models::DecoderConfig config = models::gemma3();
  models::Decoder decoder(config);
  models::KvCache cache(config);
  decoder.forward(text(1, 40), cache);
  int64_t expected = 0;
  for (const models::LayerConfig& layer : config.layers) {
    const int64_t positions = layer.window == 0 ? 40 : layer.window - 1;
    expected += 2 * positions * layer.num_key_value_heads * layer.head_dim * 4;
  }
  CHECK(cache.bytes() == expected);
}

TEST_CASE("a refused call leaves the cache as it was, and clear empties it") {
  const models::DecoderConfig config = models::gemma3();
  models::Decoder decoder(config);
  const at::Tensor tokens = text(1, 12);
  models::KvCache cache(config);
  decoder.forward(tokens.narrow(1, 0, 11), cache);
  CHECK_THROWS_AS(decoder.forward(text(2, 1), cache), ArgumentError);
  CHECK_THROWS_AS(decoder.forward(tokens.narrow(1, 0, 1) + 1000, cache), ArgumentError);
  const at::Tensor next = decoder.forward(tokens.narrow(1, 11, 1), cache);
  CHECK(difference(next, decoder.forward(tokens).narrow(1, 11, 1)) < kRounding);
  cache.clear();
  CHECK(cache.length() == 0);
  CHECK(cache.bytes() == 0);
  CHECK(difference(decoder.forward(text(2, 5), cache), decoder.forward(text(2, 5))) < kRounding);
}
