#include "export/coded_export.hpp"

#include <map>
#include <nlohmann/json.hpp>

#include "export/activation_scales.hpp"
#include "export/expert_stacks.hpp"

namespace qat {

namespace {

/// Grids of symmetric integers that could hold the numbers of another grid: its own block, as many bits or
/// more, and scales in the narrowest type first.
Choice integer_grids(const QuantizedTensor& tensor, const std::string& family) {
  const std::string& own = tensor.scheme.weight;
  if (is_symmetric_integer(own)) return {{own}, 0, ""};
  const grid::Info& info = grid::find(own).info();
  Choice choice{{}, 0, "expected symmetric integers with one scale per group, row or tensor"};
  std::string block = info.block == grid::kWholeTensor ? "_tensor" : "_channel";
  if (info.block > 0) block = "_g" + std::to_string(info.block);
  for (const int bits : {2, 3, 4, 8}) {
    if (bits < info.bits && bits != 8) continue;
    const std::string width = std::to_string(bits);
    if (family == "mobile" && bits != 3 && info.block <= 0) choice.grids.push_back("mobile" + width);
    for (const char* options : {"@fp16", "@bf16", "", "@bf16:bf16", "@fp16:fp16"}) {
      const std::string name = "int" + width + block + options;
      if (is_grid(name)) choice.grids.push_back(name);
    }
  }
  return choice;
}

std::string reason_against(const HfTensor& planned, const QuantizedTensor& tensor, const Judge& judge) {
  if (is_expert_stack(planned)) return judge(planned, tensor);
  if (module_of(planned.key).empty()) return "expected the weight of a module, got another parameter";
  if (tensor.shape.size() != 2) {
    return "expected the matrix of a linear layer or an embedding, got " +
           std::to_string(tensor.shape.size()) + " dimensions";
  }
  return judge(planned, tensor);
}

}  // namespace

Fitted fit_integers(const QuantizedCheckpoint& checkpoint, const std::string& family) {
  return fit(checkpoint, [&](const QuantizedTensor& tensor) { return integer_grids(tensor, family); });
}

std::vector<Obstacle> coded_obstacles(const Fitted& fitted, const Judge& judge) {
  std::vector<Obstacle> obstacles = fitted.obstacles;
  for (const HfTensor& planned : plan_hf(fitted.checkpoint)) {
    const auto found = fitted.checkpoint.quantized.find(planned.holder);
    if (found == fitted.checkpoint.quantized.end()) continue;
    const std::string reason = reason_against(planned, found->second, judge);
    if (!reason.empty()) obstacles.push_back({planned.key, found->second.scheme.weight, reason});
  }
  return obstacles;
}

std::vector<Obstacle> coded_obstacles(const Fitted& fitted, const std::string& dtype, const Judge& judge) {
  std::vector<Obstacle> obstacles = coded_obstacles(fitted, judge);
  return obstacles.empty() ? consumer_dtype(fitted.checkpoint, dtype).obstacles : obstacles;
}

std::vector<CodedModule> coded_modules(const QuantizedCheckpoint& checkpoint,
                                       const std::vector<HfTensor>& plan) {
  std::vector<CodedModule> modules;
  for (const HfTensor& planned : plan) {
    const auto found = checkpoint.quantized.find(planned.holder);
    if (found == checkpoint.quantized.end()) continue;
    modules.push_back(
        {&planned, &found->second, is_expert_stack(planned) ? planned.key : module_of(planned.key)});
  }
  return modules;
}

std::vector<FolderTensor> coded_tensors(const QuantizedCheckpoint& checkpoint,
                                        const std::vector<CodedModule>& modules,
                                        const std::vector<HfTensor>& plan, const HfDtype& dtype,
                                        const AddModule& add) {
  std::vector<FolderTensor> tensors;
  for (const CodedModule& module : modules) {
    const std::size_t first = tensors.size();
    add(module, tensors);
    for (std::size_t i = first; i < tensors.size(); ++i) tensors[i].key = module.planned->key;
  }
  for (const HfTensor& planned : plan) {
    if (!checkpoint.quantized.contains(planned.holder) && !is_activation_scale(planned.key)) {
      tensors.push_back(float_tensor(checkpoint, planned, dtype));
    }
  }
  return tensors;
}

std::vector<std::string> float_modules(const QuantizedCheckpoint& checkpoint,
                                       const std::vector<HfTensor>& plan, bool embeddings) {
  std::vector<std::string> modules;
  for (const HfTensor& planned : plan) {
    const std::string name = module_of(planned.key);
    const bool matrix = planned.weight && planned.shape.size() == 2 && !name.empty();
    if (!matrix || checkpoint.quantized.contains(planned.holder)) continue;
    if (embeddings || !planned.embedding) modules.push_back(name);
  }
  return modules;
}

std::string coded_readme(const std::string& name, const QuantizedCheckpoint& checkpoint,
                         const ConsumerDtype& dtype, const CodedSummary& summary) {
  std::string text = "# " + (name.empty() ? std::string("Model") : name) + "\n\n" + summary.title + ", for " +
                     summary.consumers + ", written by libqat. In a model of dtype " +
                     std::string(dtype.dtype->name) +
                     " every quantized weight is exactly the one that was trained.\n\n| grid | tensors | "
                     "weights |\n|---|---|---|\n";
  std::map<std::string, std::pair<int64_t, int64_t>> grids;
  for (const auto& [key, tensor] : checkpoint.quantized) {
    auto& [tensors, weights] = grids[tensor.scheme.weight];
    ++tensors;
    weights += tensor.codes.numel();
  }
  for (const auto& [grid, counts] : grids) {
    text +=
        "| " + grid + " | " + std::to_string(counts.first) + " | " + std::to_string(counts.second) + " |\n";
  }
  for (const std::string& key : dtype.rounded_floats) {
    text +=
        "\n`" + key + "`, which is not quantized, is rounded to " + std::string(dtype.dtype->name) + ".\n";
  }
  for (const std::string& note : summary.notes) text += "\n" + note + "\n";
  return text;
}

nlohmann::ordered_json coded_manifest(const QuantizedCheckpoint& checkpoint,
                                      const std::vector<HfTensor>& plan, const ConsumerDtype& dtype,
                                      const CodedSummary& summary) {
  nlohmann::ordered_json tensors = nlohmann::ordered_json::object(), aliases = tensors;
  for (const CodedModule& module : coded_modules(checkpoint, plan)) {
    tensors[module.planned->key] = {{"grid", module.tensor->scheme.weight}, {"shape", module.tensor->shape}};
    if (module.planned->key != module.planned->holder) aliases[module.planned->key] = module.planned->holder;
  }
  return {{"format", 1},
          {"target", summary.target},
          {"dtype", dtype.dtype->name},
          {"exact", dtype.rounded_floats.empty()},
          {"rounded_floats", dtype.rounded_floats},
          {"notes", summary.notes},
          {"aliases", aliases},
          {"tensors", tensors}};
}

std::string module_of(std::string_view key) {
  constexpr std::string_view kWeight = ".weight";
  return key.ends_with(kWeight) ? std::string(key.substr(0, key.size() - kWeight.size())) : "";
}

}  // namespace qat
