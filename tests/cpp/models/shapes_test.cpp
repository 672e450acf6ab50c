#include "qat/models/shapes.hpp"

#include "catch.hpp"
#include "shapes_of_models.hpp"

using namespace qat;
using namespace qat::models;

TEST_CASE("shapes are those of the decoder with memory, and their number is the counted one") {
  for (const auto& [name, config] : shapes()) {
    INFO(name);
    const Decoder decoder(config);
    const auto parameters = decoder.named_parameters(), buffers = decoder.named_buffers();
    double weights = 0.0;
    size_t trained = 0;
    for (const TensorShape& tensor : parameter_shapes(config)) {
      const at::Tensor real = tensor.buffer ? buffers[tensor.name] : parameters[tensor.name];
      CHECK(real.sizes() == at::IntArrayRef(tensor.shape));
      if (tensor.buffer) continue;
      weights += static_cast<double>(real.numel());
      ++trained;
    }
    CHECK(trained == parameters.size());
    CHECK(weights == weight_count(config));
  }
}

TEST_CASE("a model of 31 billion weights has its shapes without memory") {
  DecoderConfig config = gemma4(60);
  config.vocab_size = 262144;
  config.hidden_size = 5376;
  config.num_attention_heads = 32;
  for (size_t i = 0; i < config.layers.size(); ++i) {
    const bool full = i % 6 == 5;
    config.layers[i] = {
        full ? 4 : 16, full ? 512 : 256, 21504, full ? 0 : 1024, static_cast<int64_t>(i), !full, {}};
  }
  double weights = 0.0;
  for (const TensorShape& tensor : parameter_shapes(config)) {
    double count = 1.0;
    for (const int64_t size : tensor.shape) count *= static_cast<double>(size);
    if (!tensor.buffer) weights += count;
  }
  CHECK(weights == Approx(30697.3e6).epsilon(1e-5));  // the published model's
  CHECK(weights == weight_count(config));
}
