#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "gguf_rope.hpp"
#include "qat/arch/family.hpp"
#include "qat/core/error.hpp"
#include "qat/io/gguf.hpp"
#include "stored_model.hpp"
#include "values.hpp"

namespace qat::models {
namespace {

using Json = nlohmann::ordered_json;

std::string where(const io::GgufFile& file) {
  return "load_model: " + file.path().string() + ": ";
}

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

void copy_keys(const io::GgufFile& file, const arch::Family& family, Json& config) {
  for (const arch::ConfigKey& key : family.config) {
    const bool may_lack = key.absent != arch::Absent::kError || key.gguf == vocabulary_key(family);
    if (may_lack && file.metadata().find(key.gguf) == nullptr) continue;
    const Json value = value_of(file, key);  // names the key when it is missing
    const Json::json_pointer place = pointer(key.hf.front());
    if (config.contains(place) && config[place] != value) {
      throw UnsupportedError(where(file) + std::string(key.gguf) + ": expected " + config[place].dump() +
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
void refuse_what_is_missing(const io::GgufFile& file, const arch::Family& family) {
  const std::string prefix(family.gguf_architecture);
  for (const auto& [key, neutral] : kNeutral) {
    const std::string name = prefix + key;
    if (file.metadata().find(name) == nullptr || file.get_number(name) == neutral) continue;
    throw UnsupportedError(where(file) + name + ": expected " + std::to_string(static_cast<int>(neutral)) +
                           " or no such key, got " + std::to_string(file.get_number(name)));
  }
}

/// Whether the first layer has one of these biases.
bool has_any(const io::GgufFile& file, std::initializer_list<const char*> parts) {
  return std::any_of(parts.begin(), parts.end(), [&file](const char* part) {
    return file.find_tensor(std::string("blk.0.") + part + ".bias") != nullptr;
  });
}

Json make_config(const io::GgufFile& file, const arch::Family& family) {
  Json config;
  config["architectures"] = {family.hf_class};
  config["model_type"] = family.model_types.front();
  config["hidden_act"] = family.activation;
  if (arch::hf_to_gguf(
          family, "model.layers.0.mlp.gate_proj.bias")) {  // llama; other families' classes have no such keys
    config["attention_bias"] = has_any(file, {"attn_q", "attn_k", "attn_v", "attn_output"});
    config["mlp_bias"] = has_any(file, {"ffn_gate", "ffn_up", "ffn_down"});
  }
  copy_keys(file, family, config);
  if (!config.contains("vocab_size")) {
    if (const io::GgufTensor* embedding = file.find_tensor("token_embd.weight")) {
      config["vocab_size"] = embedding->shape().front();
    }
  }
  const Json base = config.value("rope_parameters", Json::object());
  const arch::Rope rope = read_gguf_rope(file, family, base.value("rope_theta", arch::Rope().theta));
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

/// The row of the Hugging Face tensor that each row of the GGUF tensor is; empty when they are the same.
std::vector<int64_t> row_order(arch::RowOrder rows, int64_t count, const DecoderConfig& config) {
  switch (rows) {
    case arch::RowOrder::kSame:
      return {};
    case arch::RowOrder::kRopeQueryHeads:
      return arch::rope_permutation(count, config.num_attention_heads);
    case arch::RowOrder::kRopeKeyHeads:
      return arch::rope_permutation(count, config.num_key_value_heads);
  }
  return {};
}

StoredTensor open_tensor(const std::shared_ptr<const io::GgufFile>& file, const io::GgufTensor& tensor,
                         arch::RowOrder rows, const DecoderConfig& config) {
  const grid::GgmlType* type = grid::ggml_type(tensor.type);
  if (type == nullptr) {
    throw UnsupportedError(where(*file) + tensor.name + ": expected a type that libqat has a grid for, got " +
                           std::string(io::ggml_type_size(tensor.type)->name));
  }
  const bool moved_bias = rows != arch::RowOrder::kSame && tensor.dims.size() == 1;
  if (moved_bias && type->unpack != nullptr) {
    throw UnsupportedError(where(*file) + tensor.name + ": expected a bias in a float type, got " +
                           std::string(type->name));
  }
  // The permutation is made when the tensor is read: by then its shape has been checked.
  return {tensor.shape(), [file, &tensor, type, rows, config, moved_bias] {
            const std::vector<int64_t> shape = tensor.shape();
            const std::vector<int64_t> order = row_order(rows, shape.front(), config);
            // Each value of a bias belongs to a row.
            return moved_bias ? read_ggml(tensor.data, *type, {shape.front(), 1}, order).flatten()
                              : read_ggml(tensor.data, *type, shape, order);
          }};
}

const arch::Family& family_of(const io::GgufFile& file) {
  try {
    return arch::find_by_gguf_architecture(file.get<std::string>("general.architecture"));
  } catch (const UnsupportedError& error) {
    throw UnsupportedError(where(file) + error.what());
  }
}

}  // namespace

StoredModel open_gguf(const std::string& path) {
  const auto file = std::make_shared<const io::GgufFile>(path);
  const arch::Family& family = family_of(*file);
  refuse_what_is_missing(*file, family);
  // A string of the metadata may not be UTF-8.
  const std::string config_text =
      make_config(*file, family).dump(2, ' ', false, Json::error_handler_t::replace);
  StoredModel stored{path, config_text, path, {}};
  const DecoderConfig config = config_of_file("load_model", path, stored.config);
  for (const io::GgufTensor& tensor : file->tensors()) {
    if (arch::matches_any(family.gguf_only, tensor.name)) continue;
    const auto mapped = arch::gguf_to_hf(family, tensor.name);
    const arch::RowOrder rows = mapped ? mapped->rule->rows : arch::RowOrder::kSame;
    stored.tensors[mapped ? mapped->name : tensor.name] = open_tensor(file, tensor, rows, config);
  }
  return stored;
}

}  // namespace qat::models
