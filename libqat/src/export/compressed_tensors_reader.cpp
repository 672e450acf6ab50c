#include "export/compressed_tensors_reader.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "export/expert_stacks.hpp"
#include "export/hf_files.hpp"
#include "export/input_file.hpp"
#include "export/module_patterns.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/pack.hpp"

namespace qat {
namespace {

using nlohmann::json;

constexpr const char* kConfig = "config.json: quantization_config";
constexpr int64_t kWidest = int64_t{1} << 31;  // weights in a row, so that no product below overflows

constexpr const char* kParts[] = {".weight_packed", ".weight_scale", ".weight_shape"};
constexpr const char* kForeign[] = {".weight_zero_point", ".weight_g_idx"};
/// Here, and in checkpoints.
constexpr std::pair<const char*, const char*> kScales[] = {{".input_scale", kInputScale},
                                                           {".output_scale", kOutputScale}};

struct GroupScheme {
  std::vector<std::string> targets;
  int bits = 0;
  int64_t block = 0;                   ///< as in grid::Info
  bool input = false, output = false;  ///< whether activations have a static scale
};

/// By the name of the module.
using Schemes = std::map<std::string, GroupScheme>;

/// What a group of the configuration says of its weights.
class GroupParser {
 public:
  GroupParser(const std::filesystem::path& folder, const std::string& name, const json& group)
      : folder_(folder), where_(std::string(kConfig) + ".config_groups." + name), group_(group) {}

  GroupScheme parse() const {
    GroupScheme scheme;
    const json& weights = field(group_, "weights");
    if (!weights.is_object()) fail("weights", "an object", weights);
    support(field(group_, "format"), "format", {json(), "pack-quantized"});
    scheme.input = has_scale("input_activations");
    scheme.output = has_scale("output_activations");
    support(field(weights, "type"), "weights.type", {"int", json()});
    support(field(weights, "symmetric"), "weights.symmetric", {true, json()});
    support(field(weights, "actorder"), "weights.actorder", {json(), false, "weight", "static"});
    support(field(weights, "num_bits"), "weights.num_bits", {2, 3, 4, 8});
    scheme.bits = field(weights, "num_bits").get<int>();
    scheme.block = block_of(weights);
    const json& targets = field(group_, "targets");
    if (!targets.is_array()) fail("targets", "a list of names", targets);
    for (const json& target : targets) {
      if (!target.is_string()) fail("targets", "a list of names", target);
      scheme.targets.push_back(target.get<std::string>());
    }
    return scheme;
  }

 private:
  [[noreturn]] void fail(const char* key, const char* expected, const json& got) const {
    fail_folder(folder_, where_ + "." + key, expected, shown(got));
  }

  void support(const json& value, const char* key, const std::vector<json>& known) const {
    for (const json& one : known) {
      if (value == one) return;
    }
    throw UnsupportedError("import_checkpoint: " + folder_.string() + ": " + where_ + "." + key +
                           ": expected " + shown(*known.begin()) + " or what libqat's grids have, got " +
                           shown(value));
  }

  /// Nothing, or 8-bit integers with one static scale.
  bool has_scale(const std::string& key) const {
    const json& activations = field(group_, key.c_str());
    if (activations.is_null()) return false;
    if (!activations.is_object()) fail(key.c_str(), "an object or null", activations);
    const std::pair<const char*, std::vector<json>> wanted[] = {{"num_bits", {8}},
                                                                {"type", {"int", json()}},
                                                                {"symmetric", {true, json()}},
                                                                {"strategy", {"tensor", json()}},
                                                                {"dynamic", {false, json()}}};
    for (const auto& [name, known] : wanted) {
      support(field(activations, name), (key + "." + name).c_str(), known);
    }
    return true;
  }

  int64_t block_of(const json& weights) const {
    const json& size = field(weights, "group_size");
    const json& strategy = field(weights, "strategy");
    const bool sized = size.is_number_integer() && size != -1;
    if (sized && (size.get<int64_t>() <= 0 || size.get<int64_t>() > kWidest)) {
      fail("weights.group_size", "a whole number above 0", size);
    }
    if (strategy == "tensor") return grid::kWholeTensor;
    if (strategy == "channel" || (strategy.is_null() && !sized)) return grid::kWholeRow;
    support(strategy, "weights.strategy", {"group", json()});
    if (!sized) fail("weights.group_size", "a whole number above 0", size);
    return size.get<int64_t>();
  }

  const std::filesystem::path& folder_;
  std::string where_;
  const json& group_;
};

bool means(const std::string& target, const std::string& module, NameMatcher& expressions) {
  if (target.starts_with("re:")) return expressions.matches(target.substr(3), module);
  return target == module || target == "Linear";
}

/// Exact names first, then expressions and classes: the order of compressed-tensors.
const GroupScheme& scheme_of(const FolderWeights& weights, const std::vector<GroupScheme>& schemes,
                             const std::string& module, NameMatcher& expressions) {
  for (const bool exact : {true, false}) {
    for (const GroupScheme& scheme : schemes) {
      for (const std::string& target : scheme.targets) {
        if (exact ? target == module : means(target, module, expressions)) return scheme;
      }
    }
  }
  fail_folder(weights.path, module + ".weight_packed", "a group of config_groups that means it", "none");
}

/// R and N.
std::pair<int64_t, int64_t> shape_of(const FolderWeights& weights, const std::string& module) {
  const std::string name = module + ".weight_shape";
  const at::Tensor shape =
      read_tensor(expect_tensor(weights, name, {2}, {io::Dtype::kI64, io::Dtype::kI32})).to(at::kLong);
  const int64_t rows = shape.const_data_ptr<int64_t>()[0], width = shape.const_data_ptr<int64_t>()[1];
  if (rows < 1 || width < 1 || rows > kWidest || width > kWidest) {
    fail_folder(weights.path, name, "two sizes above 0", std::to_string(rows) + ", " + std::to_string(width));
  }
  return {rows, width};
}

IntegerTensor read_module(const FolderWeights& weights, const std::string& module,
                          const GroupScheme& scheme) {
  const auto [rows, width] = shape_of(weights, module);
  const int64_t words = (width * scheme.bits + 31) / 32;
  const io::SafetensorsTensor& packed =
      expect_tensor(weights, module + ".weight_packed", {rows, words}, {io::Dtype::kI32});
  const int64_t block = scheme.block > 0 ? scheme.block : width;
  if (width % block != 0) {
    fail_folder(weights.path, module + ".weight_shape", "rows of whole groups of " + std::to_string(block),
                std::to_string(width));
  }
  const bool whole = scheme.block == grid::kWholeTensor;
  const std::vector<int64_t> scales =
      whole ? std::vector<int64_t>{1} : std::vector<int64_t>{rows, width / block};
  const io::SafetensorsTensor& stored = expect_tensor(weights, module + ".weight_scale", scales,
                                                      {io::Dtype::kF32, io::Dtype::kF16, io::Dtype::kBF16});
  IntegerTensor tensor{scheme.bits, scheme.block, grid::DType::kF32, at::empty({rows, width}, at::kChar),
                       {},          {rows, width}};
  tensor.scales = read_scales(weights, stored, &tensor.stored);
  if (whole) tensor.scales = tensor.scales.reshape({1, 1});
  const auto* bytes = reinterpret_cast<const uint8_t*>(packed.data.data());
  for (int64_t row = 0; row < rows; ++row) {
    grid::unpack_codes(bytes + row * words * 4, width, scheme.bits, -(1 << (scheme.bits - 1)),
                       tensor.codes.mutable_data_ptr<int8_t>() + row * width);
  }
  return tensor;
}

/// The layers of a stack, one below the other.
IntegerTensor read_stack(const FolderWeights& weights, const std::vector<std::string>& layers,
                         const Schemes& schemes, int64_t experts) {
  IntegerTensor stack;
  std::vector<at::Tensor> codes, scales;
  for (const std::string& layer : layers) {
    const auto scheme = schemes.find(layer);
    if (scheme == schemes.end()) {
      fail_folder(weights.path, layer + ".weight_packed", "a layer of every expert", "none");
    }
    IntegerTensor one = read_module(weights, layer, scheme->second);
    if (codes.empty()) stack = one;
    if (one.bits != stack.bits || one.block != stack.block || one.stored != stack.stored ||
        one.shape != stack.shape || one.block == grid::kWholeTensor) {
      throw UnsupportedError("import_checkpoint: " + weights.path.string() + ": " + layer +
                             ": expected experts of one shape and grid with scales in rows, got others");
    }
    codes.push_back(std::move(one.codes));
    scales.push_back(std::move(one.scales));
  }
  stack.codes = at::cat(codes);
  stack.scales = at::cat(scales);
  stack.shape = {experts, stack.codes.size(0) / experts, stack.codes.size(1)};
  return stack;
}

/// The stacks that the folder's layers make up. Those of a model whose experts are modules, which libqat.json
/// names, are none.
std::map<std::string, std::vector<std::string>> stacks_of(const std::filesystem::path& path,
                                                          const Schemes& schemes) {
  const json manifest = read_json_if_there(path / kManifest);
  const json& tensors = field(manifest, "tensors");
  std::vector<std::string> layers;
  for (const auto& [module, scheme] : schemes) {
    if (field(tensors, module + ".weight").is_null()) layers.push_back(module);
  }
  return expert_stacks(layers);
}

void note_surplus(CodedFolder& folder, const std::string& tensor) {
  if (folder.surplus.empty()) folder.surplus = tensor;
}

/// Puts stacks in the place of their layers.
void join_experts(CodedFolder& folder, const std::shared_ptr<const Schemes>& schemes) {
  for (const auto& [key, layers] : stacks_of(folder.weights->path, *schemes)) {
    const auto experts = static_cast<int64_t>(layers.size()) / (key.ends_with("gate_up_proj") ? 2 : 1);
    for (const std::string& layer : layers) {
      folder.coded.erase(layer + ".weight");
      const auto scheme = schemes->find(layer);
      if (scheme == schemes->end()) continue;
      const bool input = scheme->second.input;
      if (input || scheme->second.output) note_surplus(folder, layer + kScales[input ? 0 : 1].first);
    }
    folder.coded[key] = [shared = folder.weights, layers = layers, schemes, experts] {
      return read_stack(*shared, layers, *schemes, experts);
    };
  }
}

}  // namespace

bool is_compressed_tensors(const std::filesystem::path& path) {
  return quantization_method(path) == "compressed-tensors";
}

CodedFolder open_compressed_tensors(const std::filesystem::path& path) {
  CodedFolder folder = open_folder(path);
  const json config = read_json(path / "config.json");
  const json& groups = field(field(config, "quantization_config"), "config_groups");
  if (!groups.is_object())
    fail_folder(path, std::string(kConfig) + ".config_groups", "an object", shown(groups));
  std::vector<GroupScheme> schemes;
  for (const auto& [name, group] : groups.items()) schemes.push_back(GroupParser(path, name, group).parse());

  const FolderWeights& weights = *folder.weights;
  const std::vector<std::string> names = weights.tensors.names();
  std::set<std::string> parts;
  Schemes modules;
  NameMatcher expressions(MatchFrom::kStart);
  for (const std::string& name : names) {
    constexpr std::string_view kPacked = ".weight_packed";
    if (!name.ends_with(kPacked)) continue;
    const std::string module = name.substr(0, name.size() - kPacked.size());
    for (const char* part : kParts) parts.insert(module + part);
    for (const char* part : kForeign) {
      if (weights.tensors.find(module + part) != nullptr) note_surplus(folder, module + part);
    }
    const GroupScheme& scheme = modules[module] = scheme_of(weights, schemes, module, expressions);
    folder.coded[module + ".weight"] = [shared = folder.weights, module, scheme] {
      return read_module(*shared, module, scheme);
    };
    for (const auto& [part, key] : kScales) {
      if (part == kScales[0].first ? !scheme.input : !scheme.output) continue;
      parts.insert(module + part);
      if (const float scale = read_number(weights, module + part); scale != 0.0F) {
        folder.scales[module + key] = scale;
      }
    }
  }
  for (const std::string& name : names) {
    const bool scale = name.ends_with(kScales[0].first) || name.ends_with(kScales[1].first);
    if (scale && !parts.contains(name)) note_surplus(folder, name);
    if (!parts.contains(name) && name != folder.surplus) folder.floats.push_back(name);
  }
  join_experts(folder, std::make_shared<const Schemes>(std::move(modules)));
  return folder;
}

}  // namespace qat
