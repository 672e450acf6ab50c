#include "qat/models/config.hpp"

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "qat/core/error.hpp"

namespace qat::models {
namespace {

using Json = nlohmann::json;

/// Sizes beyond this are a broken file, not a model; it also keeps products of two sizes within int64.
constexpr int64_t kMaxSize = int64_t{1} << 31;

[[noreturn]] void fail(const std::string& key, const std::string& expected, const std::string& got) {
  throw ArgumentError("config: \"" + key + "\": expected " + expected + ", got " + got);
}

[[noreturn]] void refuse(const std::string& key, const std::string& expected, const Json& got) {
  throw UnsupportedError("config: \"" + key + "\": expected " + expected + ", got " + got.dump());
}

/// The value of a key that is there and not null (Hugging Face writes null for "default").
const Json* find(const Json& object, const std::string& key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::optional<int64_t> find_size(const Json& config, const std::string& key) {
  const Json* value = find(config, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number_integer()) fail(key, "an integer", value->dump());
  if (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(kMaxSize)) {
    fail(key, "at most " + std::to_string(kMaxSize), value->dump());
  }
  return value->get<int64_t>();
}

int64_t require_size(const Json& config, const std::string& key) {
  const std::optional<int64_t> value = find_size(config, key);
  if (!value) fail(key, "an integer", "nothing");
  return *value;
}

double number(const Json& value, const std::string& key) {
  if (!value.is_number()) fail(key, "a number", value.dump());
  return value.get<double>();
}

bool find_bool(const Json& config, const std::string& key, bool fallback) {
  const Json* value = find(config, key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) fail(key, "true or false", value->dump());
  return value->get<bool>();
}

/// `rope_scaling` (older files, with "type" or "rope_type") and `rope_parameters` (since transformers 5).
void check_rope(const Json& rope, const std::string& key) {
  if (!rope.is_object()) fail(key, "an object or null", rope.dump());
  for (const char* name : {"rope_type", "type"}) {
    const Json* type = find(rope, name);
    if (type != nullptr && *type != "default") refuse(key + "." + name, "\"default\"", *type);
  }
}

double rope_theta(const Json& config) {
  const Json* scaling = find(config, "rope_scaling");
  if (scaling != nullptr) check_rope(*scaling, "rope_scaling");
  const Json* parameters = find(config, "rope_parameters");
  if (parameters != nullptr) {
    check_rope(*parameters, "rope_parameters");
    const Json* share = find(*parameters, "partial_rotary_factor");
    if (share != nullptr && *share != 1.0) refuse("rope_parameters.partial_rotary_factor", "1", *share);
    const Json* theta = find(*parameters, "rope_theta");
    if (theta != nullptr) return number(*theta, "rope_parameters.rope_theta");
  }
  const Json* theta = find(config, "rope_theta");
  return theta == nullptr ? DecoderConfig().rope_theta : number(*theta, "rope_theta");
}

/// Everything that would make the decoder compute another function than the model's.
void refuse_what_is_missing(const Json& config) {
  const Json* type = find(config, "model_type");
  if (type == nullptr) fail("model_type", "\"llama\"", "nothing");
  if (*type != "llama") refuse("model_type", "\"llama\"", *type);
  const Json* activation = find(config, "hidden_act");
  if (activation != nullptr && *activation != "silu") refuse("hidden_act", "\"silu\"", *activation);
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (find_bool(config, key, false)) refuse(key, "false", true);
  }
  const Json* share = find(config, "partial_rotary_factor");
  if (share != nullptr && *share != 1.0) refuse("partial_rotary_factor", "1", *share);
  if (find(config, "quantization_config") != nullptr) {
    refuse("quantization_config", "a model with float weights", "quantized weights");
  }
}

Json parse(const std::string& text) {
  Json config;
  try {
    config = Json::parse(text);
  } catch (const Json::exception& error) {
    throw ArgumentError(std::string("config: expected JSON, got a parse error: ") + error.what());
  }
  if (!config.is_object()) throw ArgumentError("config: expected a JSON object, got " + config.dump());
  return config;
}

}  // namespace

DecoderConfig config_from_json(const std::string& json) {
  const Json config = parse(json);
  refuse_what_is_missing(config);
  DecoderConfig result;
  result.vocab_size = require_size(config, "vocab_size");
  result.hidden_size = require_size(config, "hidden_size");
  result.intermediate_size = require_size(config, "intermediate_size");
  result.num_hidden_layers = require_size(config, "num_hidden_layers");
  result.num_attention_heads = require_size(config, "num_attention_heads");
  result.num_key_value_heads = find_size(config, "num_key_value_heads").value_or(result.num_attention_heads);
  const std::optional<int64_t> head_dim = find_size(config, "head_dim");
  if (!head_dim && result.num_attention_heads > 0 && result.hidden_size % result.num_attention_heads != 0) {
    fail("hidden_size", "a multiple of num_attention_heads when head_dim is absent",
         std::to_string(result.hidden_size));
  }
  if (head_dim) {
    result.head_dim = *head_dim;
  } else if (result.num_attention_heads > 0) {
    result.head_dim = result.hidden_size / result.num_attention_heads;
  }
  if (const Json* eps = find(config, "rms_norm_eps")) result.rms_norm_eps = number(*eps, "rms_norm_eps");
  result.rope_theta = rope_theta(config);
  result.max_position_embeddings =
      find_size(config, "max_position_embeddings").value_or(result.max_position_embeddings);
  result.tie_word_embeddings = find_bool(config, "tie_word_embeddings", false);
  validate(result);
  return result;
}

void validate(const DecoderConfig& config) {
  const auto positive = [](const char* key, int64_t value) {
    if (value < 1 || value > kMaxSize) fail(key, "1.." + std::to_string(kMaxSize), std::to_string(value));
  };
  positive("vocab_size", config.vocab_size);
  positive("hidden_size", config.hidden_size);
  positive("intermediate_size", config.intermediate_size);
  positive("num_hidden_layers", config.num_hidden_layers);
  positive("num_attention_heads", config.num_attention_heads);
  positive("num_key_value_heads", config.num_key_value_heads);
  positive("head_dim", config.head_dim);
  positive("max_position_embeddings", config.max_position_embeddings);
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    fail("num_key_value_heads",
         "a divisor of num_attention_heads " + std::to_string(config.num_attention_heads),
         std::to_string(config.num_key_value_heads));
  }
  if (config.head_dim % 2 != 0) fail("head_dim", "an even number", std::to_string(config.head_dim));
  if (!std::isfinite(config.rms_norm_eps) || config.rms_norm_eps < 0) {
    fail("rms_norm_eps", "a number >= 0", std::to_string(config.rms_norm_eps));
  }
  if (!std::isfinite(config.rope_theta) || config.rope_theta <= 0) {
    fail("rope_theta", "a number > 0", std::to_string(config.rope_theta));
  }
}

}  // namespace qat::models
