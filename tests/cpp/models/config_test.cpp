#include "qat/models/config.hpp"

#include <string>
#include <vector>

#include "catch.hpp"
#include "qat/core/error.hpp"

using qat::models::config_from_json;

namespace {

std::string with(const std::string& more) {
  return R"({"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9)" +
         more + "}";
}

}  // namespace

TEST_CASE("what a configuration leaves out has Hugging Face's defaults") {
  const auto config = config_from_json(with(""));
  REQUIRE(config.num_key_value_heads == 9);
  REQUIRE(config.head_dim == 64);
  REQUIRE(config.rms_norm_eps == 1e-6);
  REQUIRE(config.rope.theta == 10000.0);
  REQUIRE(config.max_position_embeddings == 2048);
  REQUIRE_FALSE(config.tie_word_embeddings);
}

TEST_CASE("both spellings of the rope base are read, the current one first") {
  REQUIRE(config_from_json(with(R"(, "rope_theta": 5.0, "rope_scaling": null)")).rope.theta == 5.0);
  const char* both = R"(, "rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7})";
  REQUIRE(config_from_json(with(both)).rope.theta == 7.0);
}

TEST_CASE("null means the default") {
  REQUIRE(config_from_json(with(R"(, "head_dim": null, "num_key_value_heads": null)")).head_dim == 64);
}

TEST_CASE("text that is no JSON object is refused") {
  for (const char* text : {"", "{", "[]", "3", "null"}) {
    REQUIRE_THROWS_AS(config_from_json(text), qat::ArgumentError);
  }
}

namespace {

/// The text part of a published file with these keys besides.
qat::models::DecoderConfig gemma(const std::string& type, const std::string& more) {
  return config_from_json(R"({"model_type": ")" + type + R"(", "hidden_size": 64, "vocab_size": 97,
      "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
      "head_dim": 16, "sliding_window": 8)" +
                          more + "}");
}

constexpr const char* kLayerTypes = R"(, "layer_types": ["sliding_attention", "sliding_attention",
    "full_attention", "sliding_attention", "sliding_attention", "full_attention"])";

}  // namespace

TEST_CASE("a published file of Gemma 3 4B leaves most to the class") {
  const auto config = config_from_json(R"({"model_type": "gemma3", "text_config": {
      "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}})");
  CHECK(config.vocab_size == 262208);
  CHECK(config.num_attention_heads == 8);
  CHECK(config.tie_word_embeddings);
  CHECK(config.norm_offset == 1.0);
  CHECK(config.attention_scale == 1.0 / 16);
  CHECK(config.embedding_scale == Approx(50.596442562694074).epsilon(1e-15));
  CHECK(config.activation == qat::models::Activation::kGeluTanh);
  REQUIRE(config.layers.size() == 34);
  for (int64_t i = 0; i < 34; ++i) {
    const auto layer = config.layer(i);
    const bool full = i % 6 == 5;
    CHECK(layer.window == (full ? 0 : 1024));
    CHECK(layer.rope.theta == (full ? 1e6 : 1e4));
    CHECK(layer.rope.factor == (full ? 8.0 : 1.0));
    CHECK(layer.kv_source == i);
  }
}

TEST_CASE("head sizes of full layers: published fields and what transformers writes are one configuration") {
  const auto flat = gemma("gemma4_text", std::string(kLayerTypes) + R"(, "global_head_dim": 32,
      "num_global_key_value_heads": 1, "attention_k_eq_v": true)");
  const auto listed = gemma("gemma4_text", std::string(kLayerTypes) + R"(, "attention_k_eq_v": true,
      "per_layer_config": {"2": {"head_dim": 32, "num_key_value_heads": 1},
                           "5": {"head_dim": 32, "num_key_value_heads": 1}})");
  CHECK(flat.layers == listed.layers);
  CHECK(flat.layer(2).head_dim == 32);
  CHECK(flat.layer(2).num_key_value_heads == 1);
  CHECK_FALSE(flat.layer(2).has_value);
  CHECK(flat.layer(1).head_dim == 16);
  CHECK(flat.layer(1).has_value);
  CHECK(flat.layer(2).rope.type == qat::arch::RopeType::kProportional);
  CHECK(flat.attention_scale == 1.0);
  CHECK(flat.v_norm);
  CHECK(flat.layer_scalar);
}

TEST_CASE("shared keys come from the last layer of the same kind, and those layers may be wide") {
  const auto config = gemma("gemma4_text", std::string(kLayerTypes) + R"(, "num_kv_shared_layers": 3,
      "use_double_wide_mlp": true, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 90)");
  const std::vector<int64_t> sources = {0, 1, 2, 1, 1, 2};
  for (int64_t i = 0; i < 6; ++i) {
    CHECK(config.layer(i).kv_source == sources[static_cast<size_t>(i)]);
    CHECK(config.layer(i).intermediate_size == (i < 3 ? 96 : 192));
  }
  CHECK(config.per_layer_input == qat::models::PerLayerInputConfig{8, 90});
}

TEST_CASE("what the decoder does not compute is refused by its key") {
  const auto message = [](const std::string& more) -> std::string {
    try {
      gemma("gemma4_text", more);
    } catch (const qat::UnsupportedError& error) {
      return error.what();
    }
    return "no error";
  };
  using Catch::Matchers::Contains;
  CHECK_THAT(message(R"(, "use_bidirectional_attention": "all")"), Contains("use_bidirectional_attention"));
  CHECK_THAT(message(R"(, "attn_logit_softcapping": 50.0)"), Contains("attn_logit_softcapping"));
  CHECK_THAT(message(R"(, "attention_bias": true)"), Contains("attention_bias"));
  CHECK_THAT(message(R"(, "hidden_activation": "relu")"), Contains("hidden_activation"));
  CHECK_THAT(message(R"(, "quantization_config": {"bits": 4})"), Contains("quantization_config"));
}
