// Reading folders of MLX, ours or those that mlx-lm converts.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/check.hpp"
#include "export/coded_folder.hpp"
#include "export/comparison.hpp"
#include "export/input_file.hpp"
#include "export/mlx.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/pack.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kParts[] = {".weight", ".scales", ".biases"};

struct MlxFolder {
  FolderWeights weights;
  Json config;                       ///< of the model, without its quantization
  nlohmann::json layouts;            ///< config.json's `quantization`
  std::vector<std::string> modules;  ///< paths of the quantized ones
  std::vector<std::string> floats;   ///< the other tensors
};

std::string where(const MlxFolder& folder) {
  return "import_checkpoint: " + folder.weights.path.string() + ": ";
}

MlxFolder open(const std::filesystem::path& path) {
  Json config = Json::parse(read_text(path / "config.json"), nullptr, false);
  if (!config.is_object()) fail_folder(path, "config.json", "a JSON object", "something else");
  nlohmann::json layouts = config.value("quantization", Json());
  if (!layouts.is_object()) fail_folder(path, "config.json: quantization", "an object", shown(layouts));
  config.erase("quantization");
  config.erase("quantization_config");
  MlxFolder folder{{path, io::SafetensorsDirectory(path)}, std::move(config), std::move(layouts), {}, {}};
  std::set<std::string> parts;
  const std::vector<std::string> names = folder.weights.tensors.names();
  for (const std::string& name : names) {
    constexpr std::string_view kScales = ".scales";
    if (!name.ends_with(kScales)) continue;
    folder.modules.push_back(name.substr(0, name.size() - kScales.size()));
    for (const char* part : kParts) parts.insert(folder.modules.back() + part);
  }
  std::copy_if(names.begin(), names.end(), std::back_inserter(folder.floats),
               [&](const std::string& name) { return !parts.contains(name); });
  return folder;
}

/// `key` of the module's entry, or of the whole model.
int64_t layout_value(const MlxFolder& folder, const std::string& module, const char* key) {
  const nlohmann::json& entry = field(folder.layouts, module);
  const nlohmann::json& value = field(entry.is_object() ? entry : folder.layouts, key);
  if (value.is_number_integer()) return value.get<int64_t>();
  fail_folder(folder.weights.path, "config.json: quantization: " + module + ": " + key, "a whole number",
              shown(value));
}

/// The module's grid, from its entry and the type of its scales.
const grid::Grid& grid_of(const MlxFolder& folder, const std::string& module, io::Dtype scales) {
  const nlohmann::json& entry = field(folder.layouts, module);
  const nlohmann::json& mode = field(entry.is_object() ? entry : folder.layouts, "mode");
  if (!mode.is_null() && mode != "affine") {
    throw UnsupportedError(where(folder) + module + ": expected the mode \"affine\", got " + shown(mode));
  }
  const std::string name = "mlx" + std::to_string(layout_value(folder, module, "bits")) + "_g" +
                           std::to_string(layout_value(folder, module, "group_size"));
  if (const auto bad = grid::bad_name(name)) {
    throw UnsupportedError(where(folder) + module +
                           ": expected 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or "
                           "128, got " +
                           name);
  }
  const char* option = scales == io::Dtype::kF16 ? "fp16" : scales == io::Dtype::kBF16 ? "bf16" : "";
  return grid::find(grid::with_options(name, option, ""));
}

at::Tensor unpacked(const io::SafetensorsTensor& stored, const grid::Info& info, int64_t width) {
  const int64_t rows = stored.shape[0], row_bytes = width * info.bits / 8;
  at::Tensor codes = at::empty({rows, width}, at::kChar);
  const auto* bytes = reinterpret_cast<const uint8_t*>(stored.data.data());
  auto* to = codes.mutable_data_ptr<int8_t>();
  constexpr int64_t kCodesPerTask = 65536;
  at::parallel_for(0, rows, 1 + kCodesPerTask / width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      grid::unpack_codes(bytes + row * row_bytes, width, info.bits, info.code_min, to + row * width);
    }
  });
  return codes;
}

QuantizedTensor read_module(const MlxFolder& folder, const std::string& module) {
  const std::filesystem::path& path = folder.weights.path;
  const io::SafetensorsTensor& scales = folder.weights.tensors.at(module + ".scales");
  if (scales.shape.size() != 2 || scales.shape[0] < 1 || scales.shape[1] < 1) {
    fail_folder(path, scales.name, "[R, N / group]", shape_text(scales.shape));
  }
  const io::SafetensorsTensor& biases =
      expect_tensor(folder.weights, module + ".biases", scales.shape, {scales.dtype});
  const grid::Grid& grid = grid_of(folder, module, scales.dtype);
  const int64_t rows = scales.shape[0], width = scales.shape[1] * grid.info().block;
  const io::SafetensorsTensor& weight = expect_tensor(
      folder.weights, module + ".weight", {rows, width * grid.info().bits / 32}, {io::Dtype::kU32});
  grid::DType type{};
  const std::vector<at::Tensor> both{read_scales(folder.weights, scales, &type),
                                     read_scales(folder.weights, biases, &type)};
  return {{std::string(grid.info().name)},
          {rows, width},
          unpacked(weight, grid.info(), width),
          at::stack(both, 2)};
}

void compare_module(const MlxFolder& folder, const std::string& key, const QuantizedTensor& expected,
                    std::vector<Difference>& differences) {
  const std::string module = key.substr(0, key.rfind('.'));
  if (std::find(folder.modules.begin(), folder.modules.end(), module) == folder.modules.end()) {
    differences.push_back({key, "missing", 1, "expected codes and scales, got none"});
    return;
  }
  compare_quantized(key, expected, read_module(folder, module), differences);
}

}  // namespace

bool is_mlx_folder(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path)) return false;
  try {
    const nlohmann::json config = read_json_if_there(path / "config.json");
    return field(config, "quantization").is_object();
  } catch (const FileError&) {
    return false;
  }
}

QuantizedCheckpoint read_mlx(const std::string& path) {
  const MlxFolder folder = open(path);
  QuantizedCheckpoint checkpoint;
  std::set<std::string> keys;
  for (const std::string& module : folder.modules) {
    checkpoint.quantized[module + ".weight"] = read_module(folder, module);
    keys.insert(module + ".weight");
  }
  for (const std::string& name : folder.floats) {
    checkpoint.floats[name] = read_tensor(folder.weights.tensors.at(name));
    keys.insert(name);
  }
  checkpoint.config = folder.config.dump(2);
  checkpoint.aliases = tied_head(checkpoint.config, keys);
  checkpoint.tokenizer = has_tokenizer(folder.weights.path) ? path : "none";
  checkpoint::check({where(folder), true}, checkpoint);
  return checkpoint;
}

std::vector<Difference> verify_mlx(const std::string& path, const QuantizedCheckpoint& checkpoint) {
  const MlxFolder folder = open(path);
  const MlxPlan plan = plan_mlx(checkpoint);
  const QuantizedCheckpoint& fitted = plan.fitted.checkpoint;
  std::vector<Difference> differences;
  if (!same_model(folder.config.dump(), mlx_config(plan).dump())) {
    differences.push_back(
        {"config.json", "metadata", 1, "expected the checkpoint's configuration, got another"});
  }
  std::set<std::string> expected;
  for (const HfTensor& planned : plan.tensors) {
    expected.insert(planned.key);
    const auto quantized = fitted.quantized.find(planned.holder);
    if (quantized != fitted.quantized.end()) {
      compare_module(folder, planned.key, quantized->second, differences);
    } else if (const auto* stored = folder.weights.tensors.find(planned.key); stored != nullptr) {
      compare_stored(fitted, planned, *stored, differences);
    } else {
      differences.push_back({planned.key, "missing", 1, "expected a tensor, got none"});
    }
  }
  const auto surplus = [&](const std::string& name) {
    if (!expected.contains(name))
      differences.push_back({name, "extra", 1, "expected no such tensor, got one"});
  };
  for (const std::string& module : folder.modules) surplus(module + ".weight");
  for (const std::string& name : folder.floats) surplus(name);
  return differences;
}

}  // namespace qat
