#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>

#include "export/activation_scales.hpp"
#include "qat/arch/family.hpp"
#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/export/export.hpp"
#include "qat/io/mapped_file.hpp"
#include "qat/io/safetensors.hpp"
#include "stored_model.hpp"
#include "values.hpp"

namespace qat::models {
namespace {

std::string read_text(const std::filesystem::path& path) {
  const io::MappedFile file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.size()};
}

grid::DType float_type(const std::string& path, const io::SafetensorsTensor& tensor) {
  switch (tensor.dtype) {
    case io::Dtype::kF32:
      return grid::DType::kF32;
    case io::Dtype::kF16:
      return grid::DType::kF16;
    case io::Dtype::kBF16:
      return grid::DType::kBF16;
    default:
      throw UnsupportedError("load_model: " + path + ": " + tensor.name +
                             ": expected F32, F16 or BF16, got " + std::string(io::to_string(tensor.dtype)));
  }
}

/// Of a model with more than text only the decoder is loaded: its configuration is the "text_config" alone,
/// as transformers writes it for the class of the decoder.
std::string decoder_config(const std::string& json) {
  using Json = nlohmann::ordered_json;
  Json whole = Json::parse(json, nullptr, false);
  if (!whole.is_object()) return json;
  // Float checkpoints that lie on a grid may say which; without a method, nothing in them is packed.
  const bool packed = whole.contains("quantization_config") && whole["quantization_config"].is_object() &&
                      whole["quantization_config"].contains("quant_method");
  const bool dropped = !packed && whole.erase("quantization_config") > 0;
  if (!whole.contains("text_config") || !whole["text_config"].is_object()) {
    return dropped ? whole.dump(2) : json;
  }
  Json text = whole["text_config"];
  for (const char* key : {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
                          "torch_dtype", "quantization_config"}) {
    if (whole.contains(key) && !text.contains(key)) text[key] = whole[key];
  }
  if (whole.contains("architectures") && whole["architectures"].is_array()) {
    text["architectures"] = Json::array();
    constexpr std::string_view kAll = "ForConditionalGeneration";
    for (const Json& name : whole["architectures"]) {
      std::string name_of_text = name.is_string() ? name.get<std::string>() : "";
      if (const size_t place = name_of_text.find(kAll); place != std::string::npos) {
        name_of_text.replace(place, kAll.size(), "ForCausalLM");
      }
      text["architectures"].push_back(name_of_text);
    }
  }
  return text.dump(2);
}

using Codes = std::shared_ptr<const QuantizedCheckpoint>;

}  // namespace

StoredModel open_coded_directory(const std::string& path) {
  const Codes codes = std::make_shared<const QuantizedCheckpoint>(import_checkpoint(path));
  StoredModel stored{path, decoder_config(codes->config), path, {}};
  const DecoderConfig config = config_of_file("load_model", path, stored.config);
  const arch::Family& family = arch::find_by_model_type(config.model_type);
  const auto add = [&](const std::string& key, const std::vector<int64_t>& shape) {
    const std::string canonical = arch::canonical_name(family, key);
    if (is_activation_scale(key) || arch::matches_any(family.hf_only, canonical)) return;
    stored.tensors[canonical] = {shape, [codes, key] { return weight_of(*codes, key); }};
  };
  for (const auto& [key, tensor] : codes->quantized) add(key, tensor.shape);
  for (const auto& [key, tensor] : codes->floats) add(key, tensor.sizes().vec());
  return stored;
}

StoredModel open_directory(const std::string& path) {
  const std::filesystem::path folder(path);
  StoredModel stored{path, decoder_config(read_text(folder / "config.json")), path, {}};
  const DecoderConfig config = config_of_file("load_model", (folder / "config.json").string(), stored.config);
  const arch::Family& family = arch::find_by_model_type(config.model_type);
  const auto files = std::make_shared<const io::SafetensorsDirectory>(folder);
  for (const std::string& name : files->names()) {
    const std::string canonical = arch::canonical_name(family, name);
    if (arch::matches_any(family.hf_only, canonical)) continue;
    const io::SafetensorsTensor* tensor = files->find(name);
    const grid::DType dtype = float_type(path, *tensor);
    // `files` keeps the map alive for as long as the tensor may be read.
    stored.tensors[canonical] = {
        tensor->shape, [files, tensor, dtype] { return read_floats(tensor->data, dtype, tensor->shape); }};
  }
  return stored;
}

}  // namespace qat::models
