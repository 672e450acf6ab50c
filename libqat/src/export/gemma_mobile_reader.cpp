#include "export/gemma_mobile_reader.hpp"

#include <ATen/ops/empty.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "export/hf_files.hpp"
#include "export/input_file.hpp"
#include "export/module_patterns.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/pack.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kConfig = "config.json: quantization_config";
constexpr int64_t kWidest = int64_t{1} << 31;

/// Widths by module, in the order of the file: the first expression that is found in a name decides.
struct Widths {
  std::vector<std::pair<std::string, int>> patterns;
  int others = 4;
  NameMatcher expressions{MatchFrom::kAnywhere};

  int of(const std::string& module) {
    for (const auto& [pattern, bits] : patterns) {
      if (expressions.matches(pattern, module)) return bits;
    }
    return others;
  }
};

int bits_of(const std::filesystem::path& folder, const std::string& where, const Json& value, int fallback) {
  if (value.is_null()) return fallback;
  if (value == 2 || value == 4 || value == 8) return value.get<int>();
  fail_folder(folder, where, "2, 4 or 8", shown(nlohmann::json(value)));
}

Json member(const Json& object, const char* key) {
  return object.is_object() && object.contains(key) ? object[key] : Json();
}

Widths widths_of(const std::filesystem::path& folder) {
  const Json config = Json::parse(read_text(folder / "config.json"), nullptr, false);
  const Json quantization = member(config, "quantization_config");
  Widths widths;
  widths.others = bits_of(folder, std::string(kConfig) + ".num_bits", member(quantization, "num_bits"), 4);
  const Json modules = member(quantization, "module_quant_configs");
  if (modules.is_null()) return widths;
  const std::string where = std::string(kConfig) + ".module_quant_configs";
  if (!modules.is_object()) fail_folder(folder, where, "an object", shown(nlohmann::json(modules)));
  for (const auto& [pattern, settings] : modules.items()) {
    widths.patterns.emplace_back(
        pattern, bits_of(folder, where + "." + pattern, member(settings, "num_bits"), widths.others));
  }
  return widths;
}

/// The names of a module's parts.
struct Parts {
  std::string codes;
  std::string scales;
  bool embedding = false;
};

/// N: the packed width says it unless the last byte is not full; then only libqat.json does.
int64_t width_of(const FolderWeights& weights, const io::SafetensorsTensor& codes, const std::string& key,
                 int bits) {
  const int64_t bytes = codes.shape[1];
  if (bits == 8) return bytes;
  const nlohmann::json manifest = read_json_if_there(weights.path / kManifest);
  const nlohmann::json& shape = field(field(field(manifest, "tensors"), key), "shape");
  if (shape.is_array() && shape.size() == 2 && shape[1].is_number_integer()) {
    const int64_t width = shape[1].get<int64_t>();
    if (width > 0 && width <= kWidest && grid::packed_bytes(width, bits) == bytes) return width;
  }
  return bytes * 8 / bits;
}

IntegerTensor read_module(const FolderWeights& weights, const Parts& parts, const std::string& key,
                          int bits) {
  const io::SafetensorsTensor& found = weights.tensors.at(parts.codes);
  if (found.shape.size() != 2 || found.shape[0] < 1 || found.shape[1] < 1 || found.shape[1] > kWidest / 8) {
    fail_folder(weights.path, parts.codes, "a matrix", "another shape");
  }
  const io::SafetensorsTensor& codes =
      expect_tensor(weights, parts.codes, found.shape, {bits == 8 ? io::Dtype::kI8 : io::Dtype::kU8});
  const int64_t rows = codes.shape[0], bytes = codes.shape[1], width = width_of(weights, codes, key, bits);
  const io::SafetensorsTensor& scales = weights.tensors.at(parts.scales);
  const int64_t blocks = parts.embedding && scales.shape.size() == 2 ? scales.shape[1] : 1;
  if (blocks < 1 || width % blocks != 0) {
    fail_folder(weights.path, parts.scales, "blocks that divide " + std::to_string(width),
                std::to_string(blocks));
  }
  expect_tensor(weights, parts.scales, {rows, blocks}, {io::Dtype::kF32, io::Dtype::kF16, io::Dtype::kBF16});
  IntegerTensor tensor{bits,
                       blocks == 1 ? grid::kWholeRow : width / blocks,
                       grid::DType::kF32,
                       at::empty({rows, width}, at::kChar),
                       {},
                       {rows, width}};
  tensor.scales = read_scales(weights, scales, &tensor.stored);
  const auto* data = reinterpret_cast<const uint8_t*>(codes.data.data());
  for (int64_t row = 0; row < rows; ++row) {
    int8_t* to = tensor.codes.mutable_data_ptr<int8_t>() + row * width;
    if (bits == 8) {
      std::memcpy(to, data + row * bytes, static_cast<std::size_t>(bytes));
    } else {
      grid::unpack_codes(data + row * bytes, width, bits, -(1 << (bits - 1)), to);
    }
  }
  return tensor;
}

}  // namespace

bool is_gemma_mobile(const std::filesystem::path& path) {
  return quantization_method(path) == "gemma";
}

CodedFolder open_gemma_mobile(const std::filesystem::path& path) {
  CodedFolder folder = open_folder(path);
  folder.family = "mobile";
  Widths widths = widths_of(path);
  const FolderWeights& weights = *folder.weights;
  const std::vector<std::string> names = weights.tensors.names();
  std::set<std::string> parts;
  for (const std::string& name : names) {
    const bool embedding = name.ends_with(".embedding_scale");
    if (!embedding && !name.ends_with(".weight_scale")) continue;
    const std::string module = name.substr(0, name.rfind('.')), key = module + ".weight";
    const Parts found{module + (embedding ? ".embedding_quantized" : ".weight"), name, embedding};
    parts.insert({found.codes, found.scales});
    folder.coded[key] = [shared = folder.weights, found, key, bits = widths.of(module)] {
      return read_module(*shared, found, key, bits);
    };
  }
  for (const std::string& name : names) {
    if (is_activation_scale(name)) {
      // 0 means that the activations are not rounded, which is what a model without the scale does.
      if (const float scale = read_number(weights, name); scale != 0.0F) folder.scales[name] = scale;
    } else if (!parts.contains(name)) {
      folder.floats.push_back(name);
    }
  }
  return folder;
}

}  // namespace qat
