#include "qat/models/config.hpp"

#include <string>

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
