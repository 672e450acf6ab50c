#include "export/hf_plan.hpp"

#include <nlohmann/json.hpp>

#include "export/input_file.hpp"
#include "qat/arch/family.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

/// Keys that say how and by whom a model was stored.
constexpr const char* kStorageKeys[] = {"dtype", "torch_dtype", "architectures", "_name_or_path",
                                        "transformers_version"};

/// Keys under which folders of codes describe them.
constexpr const char* kQuantizationKeys[] = {"quantization_config", "quantization"};

Json parse_config(const std::string& text) {
  Json config = Json::parse(text, nullptr, false);
  if (config.is_object()) return config;
  throw ArgumentError("export_checkpoint: config: expected the model's configuration as a JSON object, got " +
                      std::string(text.empty() ? "none" : "something else"));
}

/// The family of `model_type`, or null: folders are written for any model.
const arch::Family* family_of(const Json& config) {
  for (const arch::Family* family : arch::families()) {
    for (const std::string_view type : family->model_types) {
      if (config.contains("model_type") && config["model_type"] == type) return family;
    }
  }
  return nullptr;
}

arch::TensorKind kind_of(const arch::Family& family, const std::string& key) {
  const auto mapped = arch::hf_to_gguf(family, key);
  return mapped ? mapped->rule->kind : arch::TensorKind::kMatrix;
}

/// The tensor's kind in a known family; elsewhere embeddings are known by their usual names.
bool is_embedding(const arch::Family* family, const std::string& key) {
  if (family != nullptr) {
    const arch::TensorKind kind = kind_of(*family, key);
    return kind == arch::TensorKind::kEmbedding || kind == arch::TensorKind::kLayerEmbedding;
  }
  constexpr std::string_view kWeight = ".weight";
  if (!key.ends_with(kWeight)) return false;
  std::string_view module = std::string_view(key).substr(0, key.size() - kWeight.size());
  module.remove_prefix(module.rfind('.') + 1);
  return module.starts_with("embed_tokens") || module.ends_with("embedding") ||
         module.ends_with("embeddings") || module == "wte" || module == "wpe";
}

/// The name that stands in the folder for a tied head and its embedding: the embedding's.
bool is_tied_head(const Json& config, const arch::Family* family, const std::string& key,
                  const std::string& twin) {
  const bool tied = config.contains("tie_word_embeddings") && config["tie_word_embeddings"] == true;
  return tied && family != nullptr && kind_of(*family, key) == arch::TensorKind::kHead &&
         kind_of(*family, twin) == arch::TensorKind::kEmbedding;
}

class Planner {
 public:
  explicit Planner(const QuantizedCheckpoint& checkpoint)
      : checkpoint_(checkpoint), config_(parse_config(checkpoint.config)), family_(family_of(config_)) {}

  std::vector<HfTensor> plan() const {
    std::map<std::string, HfTensor> tensors;
    for (const auto& [key, tensor] : checkpoint_.quantized)
      tensors[key] = {key, key, tensor.shape, at::kFloat, true};
    for (const auto& [key, tensor] : checkpoint_.floats) {
      tensors[key] = {key, key, tensor.sizes().vec(), tensor.scalar_type(), is_weight(tensor)};
    }
    for (const auto& [alias, holder] : checkpoint_.aliases) {
      const auto found = tensors.find(holder);
      if (found == tensors.end()) {
        throw ArgumentError("export_checkpoint: " + alias + ": expected an alias of a tensor, got one of " +
                            holder + ", which is none");
      }
      if (is_tied_head(config_, family_, alias, holder)) continue;
      HfTensor twin = found->second;
      twin.key = alias;
      tensors[alias] = std::move(twin);
      if (is_tied_head(config_, family_, holder, alias)) tensors.erase(holder);
    }
    std::vector<HfTensor> sorted;
    for (auto& [key, tensor] : tensors) {
      tensor.embedding = is_embedding(family_, key);
      sorted.push_back(std::move(tensor));
    }
    return sorted;
  }

 private:
  const QuantizedCheckpoint& checkpoint_;
  Json config_;
  const arch::Family* family_;
};

}  // namespace

std::vector<HfTensor> plan_hf(const QuantizedCheckpoint& checkpoint) {
  return Planner(checkpoint).plan();
}

std::map<std::string, std::string> tied_head(const std::string& text, const std::set<std::string>& keys) {
  const Json config = parse_config(text);
  const arch::Family* family = family_of(config);
  std::string head, embedding;
  for (const arch::TensorRule& rule :
       family == nullptr ? std::span<const arch::TensorRule>() : family->tensors) {
    if (rule.kind == arch::TensorKind::kHead) head = rule.hf;
    if (rule.kind == arch::TensorKind::kEmbedding) embedding = rule.hf;
  }
  if (head.empty() || keys.contains(head) || !keys.contains(embedding)) return {};
  if (!is_tied_head(config, family, head, embedding)) return {};
  return {{head, embedding}};
}

nlohmann::ordered_json hf_config(const QuantizedCheckpoint& checkpoint, const HfDtype& dtype) {
  Json config = parse_config(checkpoint.config);
  config.erase("_name_or_path");  // a path on this machine
  config.erase("torch_dtype");
  for (const char* key : kQuantizationKeys) config.erase(key);
  config["dtype"] = dtype.name;
  const arch::Family* family = family_of(config);
  const bool unnamed = !config.contains("architectures") || config["architectures"].is_null();
  if (family != nullptr && unnamed) config["architectures"] = {family->hf_class};
  return config;
}

bool same_model(const std::string& config, const std::string& other) {
  nlohmann::json one = nlohmann::json::parse(config, nullptr, false);
  nlohmann::json two = nlohmann::json::parse(other, nullptr, false);
  if (!one.is_object() || !two.is_object()) return false;
  for (const char* key : kStorageKeys) {
    one.erase(key);
    two.erase(key);
  }
  for (const char* key : kQuantizationKeys) {
    one.erase(key);
    two.erase(key);
  }
  return one == two;
}

}  // namespace qat
