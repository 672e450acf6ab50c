#include "export/mlx.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "checkpoint/dtype.hpp"
#include "export/coded_export.hpp"
#include "export/comparison.hpp"
#include "export/targets.hpp"
#include "qat/grid/grid.hpp"
#include "qat/grid/pack.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kGroups[] = {128, 64, 32};

/// The grid of that width with the largest groups that divide the tensor's rows and its own blocks.
std::string nearest_grid(const grid::Info& info, int64_t width) {
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    if (bits < info.bits) continue;
    for (const int64_t group : kGroups) {
      const bool joins = info.block > 0 && info.block % group != 0;
      if (width % group == 0 && (!joins || group == 32)) {
        return "mlx" + std::to_string(bits) + "_g" + std::to_string(group);
      }
    }
  }
  return "mlx8_g32";
}

/// Every grid of MLX that is wide enough, small files first.
std::vector<std::string> grids_by_size(int bits, int64_t width) {
  std::vector<std::string> grids;
  for (const std::string_view name : grid::names()) {
    if (!is_mlx_grid(name) || grid::find(name).info().bits < bits || !grid::find(name).divides(width))
      continue;
    for (const char* dtype : {"bf16", "fp16", ""}) grids.push_back(grid::with_options(name, dtype, ""));
  }
  std::stable_sort(grids.begin(), grids.end(), [width](const std::string& a, const std::string& b) {
    return grid::row_bytes(grid::find(a), width) < grid::row_bytes(grid::find(b), width);
  });
  return grids;
}

Choice mlx_grids(const QuantizedTensor& tensor) {
  const std::string& own = tensor.scheme.weight;
  if (tensor.shape.size() != 2) {
    return {{}, 0, "expected the matrix of a linear layer or an embedding, got " + shape_text(tensor.shape)};
  }
  if (is_mlx_grid(own)) return {{own}, 0, ""};
  const int64_t width = tensor.shape[1];
  const grid::Info& info = grid::find(own).info();
  Choice choice{grids_by_size(info.bits, width), 0, ""};
  const auto natural = std::find(choice.grids.begin(), choice.grids.end(), nearest_grid(info, width));
  choice.natural = static_cast<std::size_t>(natural - choice.grids.begin());
  if (choice.grids.empty()) {
    choice.reason =
        "rows of " + std::to_string(width) + " weights are not whole groups of 32, MLX's smallest";
  }
  return choice;
}

bool is_float_of_mlx(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

std::vector<Obstacle> obstacles_of(const MlxPlan& plan) {
  std::vector<Obstacle> found = plan.fitted.obstacles;
  for (const HfTensor& tensor : plan.tensors) {
    const auto quantized = plan.fitted.checkpoint.quantized.find(tensor.holder);
    if (quantized != plan.fitted.checkpoint.quantized.end()) {
      if (!module_of(tensor.key).empty()) continue;
      found.push_back({tensor.key, quantized->second.scheme.weight,
                       "expected the weight of a module, got a parameter of another name"});
    } else if (tensor.weight && !is_float_of_mlx(tensor.stored)) {
      found.push_back(
          {tensor.key, c10::toString(tensor.stored), "expected float32, float16 or bfloat16 numbers"});
    }
  }
  return found;
}

std::vector<Obstacle> obstacles(const QuantizedCheckpoint& checkpoint, const ExportOptions&) {
  return obstacles_of(plan_mlx(checkpoint));
}

/// int8[R, N] -> int32[R, N * bits / 32].
at::Tensor packed(const QuantizedTensor& tensor) {
  const grid::Info& info = grid::find(tensor.scheme.weight).info();
  const at::Tensor codes = tensor.codes.cpu().contiguous();
  const int64_t rows = codes.size(0), width = codes.size(1), words = width * info.bits / 32;
  at::Tensor result = at::empty({rows, words}, at::kInt);
  auto* bytes = static_cast<uint8_t*>(result.mutable_data_ptr());
  constexpr int64_t kCodesPerTask = 65536;
  at::parallel_for(0, rows, 1 + kCodesPerTask / width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      grid::pack_codes(codes.const_data_ptr<int8_t>() + row * width, width, info.bits, info.code_min,
                       bytes + row * words * 4);
    }
  });
  return result;
}

void add_module(const std::string& name, const QuantizedTensor& tensor, std::vector<FolderTensor>& tensors) {
  const grid::Grid& grid = grid::find(tensor.scheme.weight);
  const int64_t rows = tensor.codes.size(0), width = tensor.codes.size(1);
  tensors.push_back({name + ".weight", io::Dtype::kU32, {rows, width * grid.info().bits / 32}, [&tensor] {
                       return packed(tensor);
                     }});
  const io::Dtype file = checkpoint::file_dtype(grid.info().fields[0].dtype);
  const at::ScalarType dtype = *checkpoint::tensor_dtype(file);
  for (const auto& [part, index] : {std::pair(".scales", 0), std::pair(".biases", 1)}) {
    tensors.push_back({name + part, file, {rows, grid.blocks(width)}, [&tensor, dtype, index = index] {
                         return tensor.scales.cpu().select(2, index).to(dtype).contiguous();
                       }});
  }
}

std::vector<FolderTensor> folder_tensors(const MlxPlan& plan) {
  const QuantizedCheckpoint& checkpoint = plan.fitted.checkpoint;
  std::vector<FolderTensor> tensors;
  for (const HfTensor& planned : plan.tensors) {
    const auto quantized = checkpoint.quantized.find(planned.holder);
    if (quantized != checkpoint.quantized.end()) {
      const std::size_t first = tensors.size();
      add_module(module_of(planned.key), quantized->second, tensors);
      for (std::size_t i = first; i < tensors.size(); ++i) tensors[i].key = planned.key;
      continue;
    }
    const at::Tensor& values = checkpoint.floats.at(planned.holder);
    tensors.push_back({planned.key, *checkpoint::file_dtype(values.scalar_type()), planned.shape,
                       [&values] { return values.detach().cpu().contiguous(); }, planned.key});
  }
  return tensors;
}

ExportPlan planned(const QuantizedCheckpoint& checkpoint, std::string_view /*dtype*/) {
  const MlxPlan plan = plan_mlx(checkpoint);
  return folder_plan(folder_tensors(plan), obstacles_of(plan));
}

Json layout_of(const grid::Info& info) {
  return {{"group_size", info.block}, {"bits", info.bits}, {"mode", "affine"}};
}

/// The layout of most weights for all modules, and the others by their paths.
Json quantization(const MlxPlan& plan) {
  std::map<std::string, std::pair<int64_t, Json>> layouts;
  std::vector<std::pair<std::string, Json>> modules;
  for (const CodedModule& module : coded_modules(plan.fitted.checkpoint, plan.tensors)) {
    const Json layout = layout_of(grid::find(module.tensor->scheme.weight).info());
    auto& [weights, same] = layouts[layout.dump()];
    weights += module.tensor->codes.numel();
    same = layout;
    modules.emplace_back(module.name, layout);
  }
  const auto most = std::max_element(layouts.begin(), layouts.end(), [](const auto& a, const auto& b) {
    return a.second.first < b.second.first;
  });
  if (most == layouts.end()) return nullptr;
  const Json common = most->second.second;
  Json result = common;
  for (const auto& [name, layout] : modules) {
    if (layout != common) result[name] = layout;
  }
  return result;
}

/// What config.json calls the model's type: the widest of its unquantized tensors.
const HfDtype& model_dtype(const QuantizedCheckpoint& checkpoint) {
  std::string_view name = checkpoint.floats.empty() ? "float32" : "bfloat16";
  for (const auto& [key, tensor] : checkpoint.floats) {
    if (tensor.scalar_type() == at::kFloat) return hf_dtype("float32");
    if (tensor.scalar_type() == at::kHalf) name = "float16";
  }
  return hf_dtype(name);
}

std::string readme(const std::string& name, const MlxPlan& plan) {
  std::string text = "# " + (name.empty() ? std::string("Model") : name) +
                     "\n\nQuantized weights for MLX, written by libqat: every one is exactly the trained "
                     "one.\n\n```\nmlx_lm.generate --model . --prompt \"Hello\"\n```\n\n| grid | tensors |\n"
                     "|---|---|\n";
  std::map<std::string, int> grids;
  for (const CodedModule& module : coded_modules(plan.fitted.checkpoint, plan.tensors)) {
    ++grids[module.tensor->scheme.weight];
  }
  for (const auto& [grid, count] : grids) text += "| " + grid + " | " + std::to_string(count) + " |\n";
  return text;
}

Json manifest(const MlxPlan& plan) {
  Json tensors = Json::object(), aliases = Json::object();
  for (const CodedModule& module : coded_modules(plan.fitted.checkpoint, plan.tensors)) {
    tensors[module.planned->key] = {{"grid", module.tensor->scheme.weight}, {"shape", module.tensor->shape}};
    if (module.planned->key != module.planned->holder) aliases[module.planned->key] = module.planned->holder;
  }
  return {{"format", 1}, {"target", "mlx"}, {"exact", true}, {"aliases", aliases}, {"tensors", tensors}};
}

void export_mlx(const QuantizedCheckpoint& checkpoint, const std::string& path,
                const ExportOptions& options) {
  const MlxPlan plan = plan_mlx(checkpoint);
  Json config = mlx_config(plan);
  const Json described = quantization(plan);
  if (!described.is_null()) {
    config["quantization"] = described;
    config["quantization_config"] = described;
  }
  FolderWriter folder(checkpoint, path, options);
  folder.add("config.json", config.dump(2) + "\n");
  folder.add("README.md", readme(options.name, plan));
  folder.add_weights(folder_tensors(plan), {{"format", "mlx"}});
  folder.finish(manifest(plan));
}

}  // namespace

bool is_mlx_grid(std::string_view grid) noexcept {
  return grid.starts_with("mlx");
}

MlxPlan plan_mlx(const QuantizedCheckpoint& checkpoint) {
  MlxPlan plan{fit(checkpoint, mlx_grids), {}};
  plan.tensors = plan_hf(plan.fitted.checkpoint);
  return plan;
}

Json mlx_config(const MlxPlan& plan) {
  const QuantizedCheckpoint& checkpoint = plan.fitted.checkpoint;
  Json config = hf_config(checkpoint, model_dtype(checkpoint));
  if (!config.contains("tie_word_embeddings")) {
    config["tie_word_embeddings"] =
        std::none_of(plan.tensors.begin(), plan.tensors.end(),
                     [](const HfTensor& tensor) { return tensor.key == "lm_head.weight"; });
  }
  Json rope = config.value("rope_parameters", Json());
  if (!rope.is_object() || !rope.contains("rope_theta")) return config;
  config["rope_theta"] = rope["rope_theta"];
  rope.erase("rope_theta");
  if (rope.value("rope_type", "default") != "default") config["rope_scaling"] = rope;
  return config;
}

extern const Target kMlxTarget;
constinit const Target kMlxTarget{"mlx",      {.folder = true}, obstacles,  planned,
                                  export_mlx, is_mlx_folder,    verify_mlx, read_mlx};

}  // namespace qat
