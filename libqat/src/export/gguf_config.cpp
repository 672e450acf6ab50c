#include "export/gguf_config.hpp"

#include <algorithm>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <utility>

#include "export/gguf_rope.hpp"
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

void copy_keys(const std::string& where, const io::GgufFile& file, const arch::Family& family, Json& config) {
  for (const arch::ConfigKey& key : family.config) {
    const bool may_lack = key.absent != arch::Absent::kError || key.gguf == vocabulary_key(family);
    if (may_lack && file.metadata().find(key.gguf) == nullptr) continue;
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

/// Metadata that changes what the model computes and that Hugging Face's Llama configuration cannot say.
void refuse_what_is_missing(const std::string& where, const io::GgufFile& file, const arch::Family& family) {
  const std::string prefix(family.gguf_architecture);
  for (const auto& [key, neutral] : kNeutral) {
    const std::string name = prefix + key;
    if (file.metadata().find(name) == nullptr || file.get_number(name) == neutral) continue;
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

Json make_config(const std::string& where, const io::GgufFile& file, const arch::Family& family) {
  Json config;
  config["architectures"] = {family.hf_class};
  config["model_type"] = family.model_types.front();
  config["hidden_act"] = family.activation;
  if (arch::hf_to_gguf(
          family, "model.layers.0.mlp.gate_proj.bias")) {  // llama; other families' classes have no such keys
    config["attention_bias"] = has_any(file, {"attn_q", "attn_k", "attn_v", "attn_output"});
    config["mlp_bias"] = has_any(file, {"ffn_gate", "ffn_up", "ffn_down"});
  }
  copy_keys(where, file, family, config);
  if (!config.contains("vocab_size")) {
    if (const io::GgufTensor* embedding = file.find_tensor("token_embd.weight")) {
      config["vocab_size"] = embedding->shape().front();
    }
  }
  const Json base = config.value("rope_parameters", Json::object());
  const arch::Rope rope = read_gguf_rope(where, file, family, base.value("rope_theta", arch::Rope().theta));
  config["rope_parameters"] = rope_parameters(rope);
  // What transformers 4 reads:
  config["rope_theta"] = rope.theta;
  if (rope.type != arch::RopeType::kDefault) {
    config["rope_scaling"] = config["rope_parameters"];
    config["rope_scaling"].erase("rope_theta");
  }
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
  // A string of the metadata may not be UTF-8.
  return make_config(where, file, family).dump(2, ' ', false, Json::error_handler_t::replace);
}

}  // namespace qat
