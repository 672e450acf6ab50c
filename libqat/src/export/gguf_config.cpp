#include "export/gguf_config.hpp"

#include <algorithm>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <utility>

#include "export/config_lookup.hpp"
#include "export/gguf_layers.hpp"
#include "export/gguf_rope.hpp"
#include "qat/arch/layers.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

Json value_of(const io::GgufFile& file, const arch::ConfigKey& key) {
  const std::string name(key.gguf);
  switch (key.type) {
    case arch::ValueType::kU32:
      return file.get_integer(name);
    case arch::ValueType::kF32:
      return shortest(static_cast<float>(file.get_number(name)));
    case arch::ValueType::kBool:
      return file.get<bool>(name);
    case arch::ValueType::kString:
      return file.get<std::string>(name);
  }
  return nullptr;
}

/// "a.b" -> "/a/b"
Json::json_pointer pointer(std::string_view dotted) {
  std::string path = "/" + std::string(dotted);
  std::replace(path.begin(), path.end(), '.', '/');
  return Json::json_pointer(path);
}

/// Older files lack it: the embedding's rows say the same.
std::string vocabulary_key(const arch::Family& family) {
  return std::string(family.gguf_architecture) + ".vocab_size";
}

/// A complete file may lack it.
bool may_lack(const arch::Family& family, const arch::ConfigKey& key) {
  return key.absent != arch::Absent::kError || key.condition == arch::Condition::kExperts ||
         key.gguf == vocabulary_key(family);
}

void copy_keys(const std::string& where, const io::GgufFile& file, const arch::Family& family, Json& config) {
  for (const arch::ConfigKey& key : family.config) {
    if (key.per_layer != arch::PerLayer::kNone) continue;
    if (may_lack(family, key) && file.metadata().find(key.gguf) == nullptr) continue;
    const Json value = value_of(file, key);  // names the key when it is missing
    const Json::json_pointer place = pointer(key.hf.front());
    if (config.contains(place) && config[place] != value) {
      throw UnsupportedError(where + std::string(key.gguf) + ": expected " + config[place].dump() +
                             " as the other keys of " + std::string(key.hf.front()) + " say, got " +
                             value.dump());
    }
    config[place] = value;
  }
}

/// Keys behind the architecture's name that the decoder does not know, with the value that changes nothing.
/// (llama.cpp takes YaRN's borders from the file for other architectures only.)
constexpr std::pair<const char*, double> kNeutral[] = {
    {".expert_count", 0.0},
    {".rope.scale_linear", 1.0},
    {".rope.scaling.alpha", 0.0},
    {".rope.scaling.yarn_log_multiplier", 0.0},
    {".rope.scaling.yarn_ext_factor", 1.0},
    {".rope.scaling.yarn_attn_factor", 1.0},
    {".rope.scaling.yarn_beta_fast", 32.0},
    {".rope.scaling.yarn_beta_slow", 1.0},
};

/// Metadata that changes what the model computes and that the family's configuration cannot say.
void refuse_what_is_missing(const std::string& where, const io::GgufFile& file, const arch::Family& family) {
  const std::string prefix(family.gguf_architecture);
  for (const auto& [key, neutral] : kNeutral) {
    const std::string name = prefix + key;
    const bool known = std::any_of(family.config.begin(), family.config.end(),
                                   [&](const arch::ConfigKey& each) { return each.gguf == name; });
    if (known || file.metadata().find(name) == nullptr || file.get_number(name) == neutral) continue;
    throw UnsupportedError(where + name + ": expected " + std::to_string(static_cast<int>(neutral)) +
                           " or no such key, got " + std::to_string(file.get_number(name)));
  }
}

/// Whether the first layer has one of these biases.
bool has_any(const io::GgufFile& file, std::initializer_list<const char*> parts) {
  return std::any_of(parts.begin(), parts.end(), [&file](const char* part) {
    return file.find_tensor(std::string("blk.0.") + part + ".bias") != nullptr;
  });
}

/// `rope_scaling` of transformers 4.
void add_older_scaling(const arch::Rope& rope, Json& config) {
  if (rope.type == arch::RopeType::kDefault) return;
  config["rope_scaling"] = rope_parameters(rope);
  config["rope_scaling"].erase("rope_theta");
}

/// `rope_parameters` of transformers 5, and what transformers 4 reads.
void add_rope(const std::string& where, const io::GgufFile& file, const arch::Family& family, Json& config) {
  const Json base = config.value("rope_parameters", Json::object());
  if (!family.sliding_rope) {
    const arch::Rope rope = read_gguf_rope(where, file, family, base.value("rope_theta", arch::Rope().theta));
    config["rope_parameters"] = rope_parameters(rope);
    config["rope_theta"] = rope.theta;
    add_older_scaling(rope, config);
    return;
  }
  const auto theta = [&](const char* layers, double fallback) {
    return base.value(layers, Json::object()).value("rope_theta", fallback);
  };
  const arch::Rope full = read_gguf_rope(where, file, family, theta("full_attention", arch::Rope().theta));
  const arch::Rope sliding{.theta = theta("sliding_attention", family.sliding_rope->theta)};
  config["rope_parameters"] = {{"full_attention", rope_parameters(full)},
                               {"sliding_attention", rope_parameters(sliding)}};
  if (full.type == arch::RopeType::kProportional) return;  // younger than transformers 5
  config["rope_theta"] = full.theta;
  config["rope_local_base_freq"] = sliding.theta;
  add_older_scaling(full, config);
}

/// What follows from the tensors, and from the layers.
void add_derived(const io::GgufFile& file, const arch::Family& family, Json& config) {
  for (const auto& [key, tensor] : family.row_counts) {
    const io::GgufTensor* stored = file.find_tensor(tensor);
    if (stored != nullptr && !config.contains(key)) config[std::string(key)] = stored->shape().front();
  }
  if (config.value("num_experts", int64_t{0}) > 0) config["enable_moe_block"] = true;
  for (const arch::ImpliedKey& implied : family.implied) {
    if (implied.value != arch::Implied::kAttentionScalar) continue;
    const nlohmann::json decoder = config;
    const arch::ModelShape shape = arch::read_shape(family, arch::decoder_lookup(family, lookup_in(decoder)));
    config[std::string(implied.hf)] = arch::attention_scalar(shape, config.at("hidden_size").get<int64_t>(),
                                                             config.at("num_attention_heads").get<int64_t>());
  }
}

Json make_config(const std::string& where, const io::GgufFile& file, const arch::Family& family) {
  Json config;
  config["architectures"] = {family.hf_class};
  config["model_type"] = family.model_types.front();
  config[std::string(family.activation_key)] = family.activation;
  if (arch::hf_to_gguf(
          family, "model.layers.0.mlp.gate_proj.bias")) {  // llama; other families' classes have no such keys
    config["attention_bias"] = has_any(file, {"attn_q", "attn_k", "attn_v", "attn_output"});
    config["mlp_bias"] = has_any(file, {"ffn_gate", "ffn_up", "ffn_down"});
  }
  copy_keys(where, file, family, config);
  read_gguf_layers(where, file, family, config);
  add_rope(where, file, family, config);
  add_derived(file, family, config);
  config["tie_word_embeddings"] = file.find_tensor("output.weight") == nullptr;
  for (const auto& [gguf, hf] : {std::pair("bos", "bos_token_id"), std::pair("eos", "eos_token_id"),
                                 std::pair("padding", "pad_token_id")}) {
    const std::string key = "tokenizer.ggml." + std::string(gguf) + "_token_id";
    if (file.metadata().find(key) != nullptr) config[hf] = file.get_integer(key);
  }
  return config;
}

}  // namespace

std::string config_of_gguf(const std::string& where, const io::GgufFile& file, const arch::Family& family) {
  refuse_what_is_missing(where, file, family);
  try {
    // A string of the metadata may not be UTF-8.
    return make_config(where, file, family).dump(2, ' ', false, Json::error_handler_t::replace);
  } catch (const ArgumentError& error) {  // of a field that the file's keys led to
    throw FileError(where + error.what());
  }
}

}  // namespace qat
