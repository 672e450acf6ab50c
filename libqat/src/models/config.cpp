#include "qat/models/config.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "qat/arch/family.hpp"
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

/// "a.b" below `config`, as arch::read_rope asks for it.
arch::ConfigValue look_up(const Json& config, std::string_view path) {
  const Json* node = &config;
  const std::string whole(path);
  for (std::size_t dot = path.find('.'); node != nullptr; dot = path.find('.')) {
    const bool last = dot == std::string_view::npos;
    node = find(*node, std::string(path.substr(0, dot)));
    if (last || node == nullptr) break;
    if (!node->is_object()) {
      fail(whole.substr(0, whole.size() - path.size() + dot), "an object or null", node->dump());
    }
    path.remove_prefix(dot + 1);
  }
  if (node == nullptr) return {};
  if (node->is_boolean()) return node->get<bool>();
  if (node->is_number()) return node->get<double>();
  if (node->is_string()) return node->get<std::string>();
  return true;  // an object or array
}

/// The errors of arch/rope.hpp name the key alone.
template <class Call>
auto in_config(Call call) {
  try {
    return call();
  } catch (const UnsupportedError& error) {
    throw UnsupportedError(std::string("config: ") + error.what());
  } catch (const ArgumentError& error) {
    throw ArgumentError(std::string("config: ") + error.what());
  }
}

/// The families that differ from llama by nothing but names and biases.
bool is_implemented(const arch::Family& family) {
  return !family.qk_norm && family.norm_offset == 0.0 && family.embedding_scale == arch::EmbeddingScale::kOne;
}

const arch::Family& family_of(const Json& config) {
  std::string known;
  const Json* type = find(config, "model_type");
  for (const arch::Family* family : arch::families()) {
    if (!is_implemented(*family)) continue;
    for (const std::string_view name : family->model_types) {
      if (type != nullptr && *type == name) return *family;
      known += (known.empty() ? "\"" : " or \"") + std::string(name) + "\"";
    }
  }
  if (type == nullptr) fail("model_type", known, "nothing");
  refuse("model_type", known, *type);
}

/// Everything that would make the decoder compute another function than the model's.
void refuse_what_is_missing(const Json& config) {
  const Json* activation = find(config, "hidden_act");
  if (activation != nullptr && *activation != "silu") refuse("hidden_act", "\"silu\"", *activation);
  if (find_bool(config, "use_sliding_window", false)) refuse("use_sliding_window", "false", true);
  if (const Json* types = find(config, "layer_types")) {
    const bool full = types->is_array() && std::all_of(types->begin(), types->end(), [](const Json& type) {
                        return type == "full_attention";
                      });
    if (!full) refuse("layer_types", "\"full_attention\" everywhere", *types);
  }
  if (find(config, "quantization_config") != nullptr) {
    refuse("quantization_config", "a model with float weights", "quantized weights");
  }
}

/// Whether the model has the bias `hf`: as its family's table says, or as the key says where that is left
/// open.
bool has_bias(const Json& config, const arch::Family& family, std::string_view hf, const char* key) {
  const auto& rules = family.tensors;
  const auto rule =
      std::find_if(rules.begin(), rules.end(), [hf](const arch::TensorRule& each) { return each.hf == hf; });
  if (rule == rules.end()) return false;
  return !rule->optional || find_bool(config, key, false);
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
  const arch::Family& family = family_of(config);
  refuse_what_is_missing(config);
  DecoderConfig result;
  result.model_type = family.model_types.front();
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
  const auto values = [&config](std::string_view path) { return look_up(config, path); };
  result.rope = in_config([&] { return arch::read_rope(values); });
  result.max_position_embeddings =
      find_size(config, "max_position_embeddings").value_or(result.max_position_embeddings);
  result.tie_word_embeddings = find_bool(config, "tie_word_embeddings", false);
  const auto bias = [&](const char* layer, const char* key) {
    return has_bias(config, family, "model.layers.{i}." + std::string(layer) + ".bias", key);
  };
  result.attention_bias = bias("self_attn.q_proj", "attention_bias");
  result.output_bias = bias("self_attn.o_proj", "attention_bias");
  result.mlp_bias = bias("mlp.gate_proj", "mlp_bias");
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
  in_config([&] { arch::validate(config.rope); });
}

}  // namespace qat::models
