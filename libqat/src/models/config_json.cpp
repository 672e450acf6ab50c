#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "qat/arch/family.hpp"
#include "qat/arch/layers.hpp"
#include "qat/core/error.hpp"
#include "qat/models/config.hpp"

namespace qat::models {
namespace {

using Json = nlohmann::json;

std::string text_of(const arch::ConfigValue& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return "\"" + *text + "\"";
  if (const auto* number = std::get_if<double>(&value)) return Json(*number).dump();
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  return "nothing";
}

[[noreturn]] void fail(const std::string& key, const std::string& expected, const arch::ConfigValue& got) {
  throw ArgumentError("\"" + key + "\": expected " + expected + ", got " + text_of(got));
}

[[noreturn]] void refuse(const std::string& key, const std::string& expected, const arch::ConfigValue& got) {
  throw UnsupportedError("\"" + key + "\": expected " + expected + ", got " + text_of(got));
}

/// The number that a part of a path is, if it is one.
std::optional<size_t> index_of(std::string_view part) {
  size_t index = 0;
  const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), index);
  return error == std::errc() && end == part.data() + part.size() ? std::optional(index) : std::nullopt;
}

/// A member of an object, or of an array by its number; null (Hugging Face's "default") counts as absent.
const Json* member(const Json& node, std::string_view name) {
  const Json* found = nullptr;
  if (node.is_array()) {
    if (const auto index = index_of(name); index && *index < node.size()) found = &node[*index];
  } else if (const auto place = node.find(name); place != node.end()) {
    found = &*place;
  }
  return found == nullptr || found->is_null() ? nullptr : found;
}

/// "a.b" below `config`, as arch::ConfigLookup asks for it.
arch::ConfigValue look_up(const Json& config, std::string_view path) {
  const Json* node = &config;
  const std::string whole(path);
  while (true) {
    const std::size_t dot = path.find('.');
    const std::string_view name = path.substr(0, dot);
    const bool holds = node->is_object() || (node->is_array() && index_of(name));
    if (!holds) {
      throw ArgumentError("\"" + whole.substr(0, whole.size() - path.size() - 1) +
                          "\": expected an object or null, got " + node->dump());
    }
    node = member(*node, name);
    if (node == nullptr || dot == std::string_view::npos) break;
    path.remove_prefix(dot + 1);
  }
  if (node == nullptr) return {};
  if (node->is_boolean()) return node->get<bool>();
  if (node->is_number()) return node->get<double>();
  if (node->is_string()) return node->get<std::string>();
  return true;  // an object or array
}

/// Fields of one type each.
class Fields {
 public:
  explicit Fields(const arch::ConfigLookup& lookup) : lookup_(lookup) {}

  bool has(const std::string& key) const { return !std::holds_alternative<std::monostate>(lookup_(key)); }
  arch::ConfigValue value(const std::string& key) const { return lookup_(key); }

  int64_t size(const std::string& key) const {
    const double read = number(key);
    if (read != std::floor(read) || std::abs(read) > 1e15) fail(key, "a whole number", read);
    return static_cast<int64_t>(read);
  }
  int64_t size(const std::string& key, int64_t fallback) const { return has(key) ? size(key) : fallback; }

  double number(const std::string& key) const {
    const arch::ConfigValue value = lookup_(key);
    if (const auto* read = std::get_if<double>(&value)) return *read;
    fail(key, "a number", value);
  }
  double number(const std::string& key, double fallback) const { return has(key) ? number(key) : fallback; }

  bool flag(const std::string& key, bool fallback) const {
    const arch::ConfigValue value = lookup_(key);
    if (std::holds_alternative<std::monostate>(value)) return fallback;
    if (const auto* read = std::get_if<bool>(&value)) return *read;
    fail(key, "true or false", value);
  }

 private:
  const arch::ConfigLookup& lookup_;
};

const arch::Family& family_of(const Json& config) {
  const arch::ConfigValue type = look_up(config, "model_type");
  std::string known;
  for (const arch::Family* family : arch::families()) {
    for (const std::string_view name : family->model_types) {
      if (type == arch::ConfigValue(std::string(name))) return *family;
      known += (known.empty() ? "\"" : " or \"") + std::string(name) + "\"";
    }
  }
  if (std::holds_alternative<std::monostate>(type)) fail("model_type", known, type);
  refuse("model_type", known, type);
}

const arch::TensorRule* find_rule(const arch::Family& family, std::string_view hf) {
  const auto& rules = family.tensors;
  const auto rule =
      std::find_if(rules.begin(), rules.end(), [hf](const arch::TensorRule& each) { return each.hf == hf; });
  return rule == rules.end() ? nullptr : &*rule;
}

/// Everything that would make the decoder compute another function than the model's.
void refuse_what_is_missing(const Json& config, const arch::Family& family, const Fields& fields) {
  if (fields.flag("use_sliding_window", false)) refuse("use_sliding_window", "false", true);
  if (fields.has("quantization_config") || look_up(config, "quantization_config") != arch::ConfigValue()) {
    refuse("quantization_config", "a model with float weights", std::string("quantized weights"));
  }
  if (fields.has("attn_logit_softcapping")) {
    refuse("attn_logit_softcapping", "null", fields.value("attn_logit_softcapping"));
  }
  const arch::ConfigValue both_ways = fields.value("use_bidirectional_attention");
  // For images, of which this decoder sees none.
  const bool causal = both_ways == arch::ConfigValue() || both_ways == arch::ConfigValue(false) ||
                      both_ways == arch::ConfigValue(std::string("vision"));
  if (!causal) refuse("use_bidirectional_attention", "null, false or \"vision\"", both_ways);
  const bool biases = find_rule(family, "model.layers.{i}.self_attn.q_proj.bias") != nullptr;
  if (!biases && fields.flag("attention_bias", false)) refuse("attention_bias", "false", true);
}

/// Whether the model has the bias of `layer`: as its family's table says, or as the key says where that is
/// left open.
bool has_bias(const Fields& fields, const arch::Family& family, const char* layer, const char* key) {
  const arch::TensorRule* rule = find_rule(family, "model.layers.{i}." + std::string(layer) + ".bias");
  return rule != nullptr && (!rule->optional || fields.flag(key, false));
}

Activation read_activation(const Fields& fields, const arch::Family& family) {
  const std::string key(family.activation_key);
  const arch::ConfigValue name =
      fields.has(key) ? fields.value(key) : arch::ConfigValue(std::string(family.activation));
  if (name == arch::ConfigValue(std::string("silu"))) return Activation::kSilu;
  if (name == arch::ConfigValue(std::string("gelu_pytorch_tanh"))) return Activation::kGeluTanh;
  refuse(key, "\"silu\" or \"gelu_pytorch_tanh\"", name);
}

void read_sizes(const Fields& fields, DecoderConfig& config) {
  config.vocab_size = fields.size("vocab_size");
  config.hidden_size = fields.size("hidden_size");
  config.intermediate_size = fields.size("intermediate_size");
  config.num_hidden_layers = fields.size("num_hidden_layers");
  config.num_attention_heads = fields.size("num_attention_heads");
  config.num_key_value_heads = fields.size("num_key_value_heads", config.num_attention_heads);
  const bool divides = config.num_attention_heads > 0 && config.hidden_size % config.num_attention_heads == 0;
  if (!fields.has("head_dim") && config.num_attention_heads > 0 && !divides) {
    fail("hidden_size", "a multiple of num_attention_heads when head_dim is absent",
         static_cast<double>(config.hidden_size));
  }
  config.head_dim = fields.size("head_dim", divides ? config.hidden_size / config.num_attention_heads : 0);
  config.rms_norm_eps = fields.number("rms_norm_eps", config.rms_norm_eps);
  config.max_position_embeddings = fields.size("max_position_embeddings", config.max_position_embeddings);
}

/// One entry for each layer, unless all are alike and attend to everything.
void read_layers(const arch::Family& family, const arch::ConfigLookup& lookup, DecoderConfig& config) {
  const arch::ModelShape shape = arch::read_shape(family, lookup);
  const arch::Ropes ropes = arch::read_ropes(family, lookup);
  config.rope = ropes.full;
  std::vector<LayerConfig> layers;
  bool alike = true;
  for (size_t i = 0; i < shape.layers.size(); ++i) {
    const arch::LayerShape& layer = shape.layers[i];
    layers.push_back({layer.key_heads, layer.head_dim, layer.feed_forward,
                      layer.sliding ? shape.sliding_window : 0, layer.key_source, !layer.values_are_keys,
                      layer.sliding ? ropes.sliding : ropes.full});
    alike = alike && layers.back() == config.layer(static_cast<int64_t>(i));
  }
  if (!alike) config.layers = std::move(layers);
  config.per_layer_input.size = shape.layer_inputs;
  config.experts = {shape.experts, shape.experts_per_token, shape.expert_feed_forward};
}

void read_style(const Fields& fields, const arch::Family& family, DecoderConfig& config) {
  config.attention_bias = has_bias(fields, family, "self_attn.q_proj", "attention_bias");
  config.output_bias = has_bias(fields, family, "self_attn.o_proj", "attention_bias");
  config.mlp_bias = has_bias(fields, family, "mlp.gate_proj", "mlp_bias");
  config.activation = read_activation(fields, family);
  config.norm_offset = family.norm_offset;
  config.qk_norm = family.qk_norm;
  config.v_norm = family.v_norm;
  config.branch_norms = find_rule(family, "model.layers.{i}.post_feedforward_layernorm.weight") != nullptr;
  config.layer_scalar = find_rule(family, "model.layers.{i}.layer_scalar") != nullptr;
  if (family.attention_scale == arch::AttentionScale::kOne) config.attention_scale = 1.0;
  if (family.attention_scale == arch::AttentionScale::kQueryPreAttention) {
    config.attention_scale = 1.0 / std::sqrt(fields.number("query_pre_attn_scalar"));
  }
  if (family.embedding_scale == arch::EmbeddingScale::kSqrtHidden) {
    config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
  }
  config.final_logit_softcapping = fields.number("final_logit_softcapping", 0.0);
}

DecoderConfig read_config(const Json& json) {
  const arch::Family& family = family_of(json);
  const arch::ConfigLookup lookup =
      arch::decoder_lookup(family, [&json](std::string_view path) { return look_up(json, path); });
  const Fields fields(lookup);
  refuse_what_is_missing(json, family, fields);
  DecoderConfig config;
  config.model_type = family.model_types.front();
  read_sizes(fields, config);
  config.tie_word_embeddings = fields.flag("tie_word_embeddings", false);
  read_layers(family, lookup, config);
  if (config.per_layer_input.size > 0) {
    config.per_layer_input.vocab_size = fields.size("vocab_size_per_layer_input", config.vocab_size);
  }
  read_style(fields, family, config);
  return config;
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
  const Json parsed = parse(json);
  DecoderConfig config;
  try {
    config = read_config(parsed);
  } catch (const UnsupportedError& error) {
    throw UnsupportedError(std::string("config: ") + error.what());
  } catch (const ArgumentError& error) {
    throw ArgumentError(std::string("config: ") + error.what());
  }
  validate(config);
  return config;
}

}  // namespace qat::models
