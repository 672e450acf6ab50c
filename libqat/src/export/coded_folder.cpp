#include "export/coded_folder.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "checkpoint/dtype.hpp"
#include "export/comparison.hpp"
#include "export/hf_files.hpp"
#include "export/input_file.hpp"
#include "qat/core/error.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

/// The dtype that config.json names; float32 when it names none, as transformers takes it.
std::string dtype_name(const Json& config) {
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (config.contains(key) && config[key].is_string()) return config[key].get<std::string>();
  }
  return "float32";
}

/// What an export by libqat says beside the weights; null for other folders.
nlohmann::json manifest_of(const CodedFolder& folder) {
  return read_json_if_there(folder.weights->path / kManifest);
}

std::string hint_for(const nlohmann::json& manifest, const std::string& key) {
  const nlohmann::json& grid = field(field(field(manifest, "tensors"), key), "grid");
  return grid.is_string() ? grid.get<std::string>() : "";
}

bool same(const QuantizedTensor& one, const QuantizedTensor& other) {
  return one.scheme == other.scheme && at::equal(one.codes, other.codes) &&
         at::equal(one.scales, other.scales);
}

/// Ties that the format had to write out: libqat.json names them, and both must hold the same tensor.
void restore_aliases(const nlohmann::json& manifest, QuantizedCheckpoint& checkpoint, Json& config) {
  const nlohmann::json& aliases = field(manifest, "aliases");
  if (!aliases.is_object()) return;
  for (const auto& [key, holder] : aliases.items()) {
    const auto one = checkpoint.quantized.find(key);
    const auto other = holder.is_string() ? checkpoint.quantized.find(holder.get<std::string>())
                                          : checkpoint.quantized.end();
    if (one == checkpoint.quantized.end() || other == checkpoint.quantized.end() || one == other) continue;
    if (!same(one->second, other->second)) continue;
    checkpoint.aliases[key] = other->first;
    checkpoint.quantized.erase(one);
    if (config.contains("tie_word_embeddings")) config["tie_word_embeddings"] = true;
  }
}

/// By their bits: 0 and -0 differ.
void compare_rows(const at::Tensor& expected, const at::Tensor& got, int64_t width, const char* what,
                  const std::string& key, std::vector<Difference>& differences) {
  Mismatch mismatch;
  const auto size = static_cast<int64_t>(expected.element_size());
  const auto* one = static_cast<const uint8_t*>(expected.const_data_ptr());
  const auto* other = static_cast<const uint8_t*>(got.const_data_ptr());
  for (int64_t row = 0; row < expected.numel() / width; ++row) {
    for (int64_t i = row * width; i < (row + 1) * width; ++i) {
      if (std::memcmp(one + i * size, other + i * size, static_cast<std::size_t>(size)) == 0) continue;
      const auto text = [&](const at::Tensor& tensor) {
        const at::Tensor value = tensor.reshape({-1})[i];
        return tensor.dtype() == at::kChar ? std::to_string(value.item<int64_t>())
                                           : text_of(value.item<float>());
      };
      const bool first = mismatch.count == 0;
      mismatch.add(row, i - row * width, first ? text(expected) : "", first ? text(got) : "");
    }
  }
  report(key, what, mismatch, differences);
}

std::string layout_text(const IntegerTensor& tensor) {
  const std::string bits = std::to_string(tensor.bits) + " bits, ";
  if (tensor.block == grid::kWholeTensor) return bits + "one scale";
  if (tensor.block == grid::kWholeRow) return bits + "a scale per row";
  return bits + "groups of " + std::to_string(tensor.block);
}

void compare_coded(const CodedFolder& folder, const QuantizedCheckpoint& checkpoint, const HfTensor& planned,
                   std::vector<Difference>& differences) {
  const auto found = folder.coded.find(planned.key);
  if (found == folder.coded.end()) {
    differences.push_back({planned.key, "missing", 1, "expected codes and scales, got none"});
    return;
  }
  const QuantizedTensor& tensor = checkpoint.quantized.at(planned.holder);
  if (!is_symmetric_integer(tensor.scheme.weight)) {
    differences.push_back({planned.key, "type", 1, "expected " + tensor.scheme.weight + ", got integers"});
    return;
  }
  const IntegerTensor expected = integer_tensor(planned.key, tensor);
  const IntegerTensor got = found->second();
  const auto differ = [&](const char* what, const std::string& wanted, const std::string& had) {
    differences.push_back({planned.key, what, 1, "expected " + wanted + ", got " + had});
  };
  if (got.shape != expected.shape) return differ("shape", shape_text(expected.shape), shape_text(got.shape));
  if (got.bits != expected.bits || got.scales.sizes() != expected.scales.sizes()) {
    return differ("type", layout_text(expected), layout_text(got));
  }
  const int64_t width = expected.codes.size(1);
  compare_rows(expected.codes, got.codes, width, "codes", planned.key, differences);
  compare_rows(expected.scales, got.scales, expected.scales.size(1), "scales", planned.key, differences);
  compare_rows(dequantize_tensor(planned.key, tensor).contiguous(),
               got.weight(folder.dtype->tensor).to(at::kFloat).contiguous(), width, "values", planned.key,
               differences);
}

void compare_activations(const ActivationScaleMap& expected, const ActivationScaleMap& got,
                         std::vector<Difference>& differences) {
  const auto scale_in = [](const ActivationScaleMap& scales, const std::string& key) {
    const auto found = scales.find(key);
    return found == scales.end() ? 0.0F : found->second;
  };
  ActivationScaleMap all = expected;
  all.insert(got.begin(), got.end());
  for (const auto& [key, one] : all) {
    const float wanted = scale_in(expected, key), had = scale_in(got, key);
    if (wanted == had) continue;
    differences.push_back({key, "values", 1, "expected " + text_of(wanted) + ", got " + text_of(had)});
  }
}

}  // namespace

CodedFolder open_folder(const std::filesystem::path& path) {
  const std::string text = read_text(path / "config.json");
  Json config = Json::parse(text, nullptr, false);
  if (!config.is_object()) fail_folder(path, "config.json", "a JSON object", "something else");
  const std::string dtype = dtype_name(config);
  if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16") {
    fail_folder(path, "config.json: dtype", "float32, float16 or bfloat16", shown(nlohmann::json(dtype)));
  }
  config.erase("quantization_config");
  auto weights = std::make_shared<const FolderWeights>(FolderWeights{path, io::SafetensorsDirectory(path)});
  return {std::move(weights), config.dump(2), &hf_dtype(dtype), "int", {}, {}, {}, ""};
}

bool has_tokenizer(const std::filesystem::path& folder) {
  const auto there = [&](const char* name) { return std::filesystem::is_regular_file(folder / name); };
  return there("tokenizer.json") || there("tokenizer.model") || there("tokenizer_config.json");
}

void fail_folder(const std::filesystem::path& folder, const std::string& where, const std::string& expected,
                 const std::string& got) {
  throw FileError("import_checkpoint: " + folder.string() + ": " + where + ": expected " + expected +
                  ", got " + got);
}

const io::SafetensorsTensor& expect_tensor(const FolderWeights& weights, const std::string& name,
                                           const std::vector<int64_t>& shape,
                                           const std::vector<io::Dtype>& dtypes) {
  const io::SafetensorsTensor& stored = weights.tensors.at(name);
  if (std::find(dtypes.begin(), dtypes.end(), stored.dtype) == dtypes.end()) {
    std::string names;
    for (const io::Dtype dtype : dtypes)
      names += (names.empty() ? "" : " or ") + std::string(io::to_string(dtype));
    fail_folder(weights.path, name, names, std::string(io::to_string(stored.dtype)));
  }
  if (stored.shape != shape) fail_folder(weights.path, name, shape_text(shape), shape_text(stored.shape));
  return stored;
}

at::Tensor read_tensor(const io::SafetensorsTensor& stored) {
  const auto dtype = checkpoint::tensor_dtype(stored.dtype);
  if (!dtype) {
    throw UnsupportedError("import_checkpoint: " + stored.name + ": expected a type that torch has, got " +
                           std::string(io::to_string(stored.dtype)));
  }
  at::Tensor values = at::empty(stored.shape, *dtype);
  if (!stored.data.empty()) std::memcpy(values.mutable_data_ptr(), stored.data.data(), stored.data.size());
  return values;
}

at::Tensor read_scales(const FolderWeights& weights, const io::SafetensorsTensor& stored, grid::DType* type) {
  *type = stored.dtype == io::Dtype::kBF16  ? grid::DType::kBF16
          : stored.dtype == io::Dtype::kF16 ? grid::DType::kF16
                                            : grid::DType::kF32;
  const at::Tensor scales = read_tensor(stored).to(at::kFloat).contiguous();
  if (!scales.isfinite().all().item<bool>())
    fail_folder(weights.path, stored.name, "finite scales", "others");
  return scales;
}

float read_number(const FolderWeights& weights, const std::string& name) {
  const at::Tensor tensor = read_tensor(weights.tensors.at(name));
  const bool fits = tensor.numel() == 1 && tensor.is_floating_point();
  const float number = fits ? tensor.to(at::kFloat).item<float>() : 0.0F;
  if (!fits || !std::isfinite(number)) fail_folder(weights.path, name, "one finite number", "something else");
  return number;
}

QuantizedCheckpoint import_folder(const CodedFolder& folder) {
  if (!folder.surplus.empty()) {
    throw UnsupportedError("import_checkpoint: " + folder.weights->path.string() + ": " + folder.surplus +
                           ": expected symmetric weights in their own order and float activations, got "
                           "a tensor that says otherwise");
  }
  const nlohmann::json manifest = manifest_of(folder);
  QuantizedCheckpoint checkpoint;
  std::set<std::string> keys;
  for (const auto& [key, read] : folder.coded) {
    checkpoint.quantized[key] = on_grid(key, read(), *folder.dtype, folder.family, hint_for(manifest, key));
    keys.insert(key);
  }
  for (const std::string& name : folder.floats) {
    checkpoint.floats[name] = read_tensor(folder.weights->tensors.at(name));
    keys.insert(name);
  }
  for (const auto& [key, scale] : folder.scales) {
    checkpoint.floats[key] = at::scalar_tensor(scale, at::kFloat);
  }
  Json config = Json::parse(folder.config);
  restore_aliases(manifest, checkpoint, config);
  checkpoint.config = config.dump(2);
  checkpoint.aliases.merge(tied_head(folder.config, keys));
  checkpoint.tokenizer = has_tokenizer(folder.weights->path) ? folder.weights->path.string() : "none";
  return checkpoint;
}

std::vector<Difference> verify_folder(const CodedFolder& folder, const QuantizedCheckpoint& checkpoint,
                                      const std::vector<HfTensor>& plan, bool caches) {
  std::vector<Difference> differences;
  std::set<std::string> expected;
  compare_activations(planned_scales(checkpoint, plan, caches), folder.scales, differences);
  for (const HfTensor& planned : plan) {
    if (is_activation_scale(planned.key)) continue;
    expected.insert(planned.key);
    if (checkpoint.quantized.contains(planned.holder)) {
      compare_coded(folder, checkpoint, planned, differences);
    } else if (folder.weights->tensors.find(planned.key) == nullptr || folder.coded.contains(planned.key)) {
      differences.push_back({planned.key, "missing", 1, "expected a tensor of floats, got none"});
    } else {
      compare_stored(checkpoint, planned, folder.weights->tensors.at(planned.key), differences);
    }
  }
  std::vector<std::string> names = folder.floats;
  for (const auto& [key, read] : folder.coded) names.push_back(key);
  if (!folder.surplus.empty()) names.push_back(folder.surplus);
  for (const std::string& name : names) {
    if (!expected.contains(name))
      differences.push_back({name, "extra", 1, "expected no such tensor, got one"});
  }
  return differences;
}

}  // namespace qat
