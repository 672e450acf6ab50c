#include "export/compressed_tensors_config.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "export/activation_scales.hpp"
#include "export/coded_export.hpp"
#include "export/expert_stacks.hpp"
#include "export/module_patterns.hpp"
#include "qat/grid/grid.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

/// What the modules of a group have in common.
struct GroupOf {
  int bits;
  int64_t block;
  bool input, output;  ///< whether their activations are rounded

  auto operator<=>(const GroupOf&) const = default;
};

GroupOf group_of(const QuantizedCheckpoint& checkpoint, const CodedModule& module) {
  const grid::Info& info = grid::find(module.tensor->scheme.weight).info();
  return {info.bits, info.block, activation_scale(checkpoint, *module.planned, kInputScale) != 0.0F,
          activation_scale(checkpoint, *module.planned, kOutputScale) != 0.0F};
}

Json weights_of(int bits, int64_t block) {
  const char* strategy = block == grid::kWholeTensor ? "tensor"
                         : block == grid::kWholeRow  ? "channel"
                                                     : "group";
  return {{"num_bits", bits},
          {"type", "int"},
          {"symmetric", true},
          {"strategy", strategy},
          {"group_size", block > 0 ? Json(block) : Json()},
          {"dynamic", false},
          {"actorder", nullptr},
          {"block_structure", nullptr},
          {"observer", nullptr}};
}

/// Of 8-bit activations with one scale; null where they stay as they are.
Json activations_of(bool rounded) {
  if (!rounded) return nullptr;
  return {{"num_bits", 8},      {"type", "int"},       {"symmetric", true},     {"strategy", "tensor"},
          {"dynamic", false},   {"actorder", nullptr}, {"group_size", nullptr}, {"block_structure", nullptr},
          {"observer", nullptr}};
}

/// Names of modules, or of the matrices of experts ("model.layers.0.experts.up_proj"), by their group.
using Members = std::map<GroupOf, std::vector<std::string>>;

/// Patterns for a group's names that mean none of the other groups' and none of `unquantized`.
std::vector<ModulePattern> patterns_of(const Members& members, const GroupOf& group,
                                       std::vector<std::string> unquantized) {
  const auto found = members.find(group);
  if (found == members.end()) return {};
  for (const auto& [other, names] : members) {
    if (other != group) unquantized.insert(unquantized.end(), names.begin(), names.end());
  }
  return module_patterns(found->second, unquantized);
}

std::string replaced(std::string text, const std::string& part, const std::string& by) {
  if (const std::size_t at = text.rfind(part); at != std::string::npos) text.replace(at, part.size(), by);
  return text;
}

/// vLLM calls the decoder of a model that also sees `language_model.model`, and maps names but not regular
/// expressions. (vllm/model_executor/models/gemma4_mm.py)
std::string target_of(const std::string& expression) {
  return "re:" +
         replaced(expression, "model\\.language_model\\.",
                  "(?:model\\.language_model|language_model\\.model)\\.") +
         "$";
}

/// Of every expert's matrix. Releases of vLLM in the first half of 2026 have Gemma 4's in a module `moe`.
std::string experts_target(const ModulePattern& pattern) {
  return target_of(replaced(pattern.regex ? pattern.text : escaped(pattern.text), "\\.experts\\.",
                            "\\.(?:moe\\.)?experts\\.\\d+\\."));
}

/// The matrices of a stack as the groups name them.
std::vector<std::string> matrices_of(const HfTensor& stack) {
  std::vector<std::string> names;
  for (const ExpertLayer& layer : expert_layers(stack)) {
    if (layer.first >= stack.shape[1]) break;  // the first expert has them all
    names.push_back(replaced(layer.name, ".0.", "."));
  }
  return names;
}

/// Of a configuration; "" when it has none.
std::string model_type(const std::string& text) {
  const Json config = Json::parse(text, nullptr, false);
  const bool named = config.is_object() && config.contains("model_type") && config["model_type"].is_string();
  return named ? config["model_type"].get<std::string>() : "";
}

std::vector<std::string> ignored(const QuantizedCheckpoint& checkpoint, const std::vector<HfTensor>& plan) {
  std::vector<std::string> names = float_modules(checkpoint, plan, false);
  for (const auto& [alias, holder] : checkpoint.aliases) {
    const auto planned = [key = alias](const HfTensor& tensor) { return tensor.key == key; };
    if (std::none_of(plan.begin(), plan.end(), planned)) names.push_back(module_of(alias));
  }
  return names;
}

}  // namespace

Json compressed_tensors_config(const QuantizedCheckpoint& checkpoint, const std::vector<HfTensor>& plan) {
  Members modules, experts;
  std::set<GroupOf> schemes;
  for (const CodedModule& module : coded_modules(checkpoint, plan)) {
    const GroupOf group = group_of(checkpoint, module);
    schemes.insert(group);
    if (!is_expert_stack(*module.planned)) {
      modules[group].push_back(module.name);
      continue;
    }
    for (const std::string& name : matrices_of(*module.planned)) experts[group].push_back(name);
  }
  std::vector<std::string> float_experts;
  for (const HfTensor& planned : plan) {
    if (!is_expert_stack(planned) || checkpoint.quantized.contains(planned.holder)) continue;
    for (const std::string& name : matrices_of(planned)) float_experts.push_back(name);
  }
  const std::vector<std::string> unquantized = float_modules(checkpoint, plan, false);
  Json groups = Json::object();
  for (const GroupOf& scheme : schemes) {
    Json targets = Json::array();
    for (const ModulePattern& pattern : patterns_of(modules, scheme, unquantized)) {
      targets.push_back(pattern.regex ? target_of(pattern.text) : pattern.text);
    }
    for (const ModulePattern& pattern : patterns_of(experts, scheme, float_experts)) {
      targets.push_back(experts_target(pattern));
    }
    groups["group_" + std::to_string(groups.size())] = {{"targets", targets},
                                                        {"format", "pack-quantized"},
                                                        {"input_activations", activations_of(scheme.input)},
                                                        {"output_activations", activations_of(scheme.output)},
                                                        {"weights", weights_of(scheme.bits, scheme.block)}};
  }
  return {{"quant_method", "compressed-tensors"},
          {"format", "pack-quantized"},
          {"quantization_status", "compressed"},
          {"global_compression_ratio", nullptr},
          {"kv_cache_scheme", nullptr},
          {"ignore", ignored(checkpoint, plan)},
          {"config_groups", groups}};
}

std::vector<std::string> compressed_tensors_notes(const QuantizedCheckpoint& checkpoint,
                                                  const std::vector<HfTensor>& plan) {
  constexpr std::string_view kFused[][3] = {{"q_proj", "k_proj", "v_proj"},
                                            {"gate_proj", "up_proj", ""},
                                            {".experts.gate_up_proj", ".experts.down_proj", ""}};
  std::map<std::string, GroupOf> schemes;
  for (const std::string& name : float_modules(checkpoint, plan, false)) schemes[name] = {};
  for (const HfTensor& planned : plan) {
    if (is_expert_stack(planned)) schemes[planned.key] = {};
  }
  for (const CodedModule& module : coded_modules(checkpoint, plan)) {
    schemes[module.name] = group_of(checkpoint, module);
  }
  std::vector<std::string> notes;
  for (const auto& [name, scheme] : schemes) {
    for (const auto& parts : kFused) {
      if (!name.ends_with(parts[0])) continue;
      const std::string parent = name.substr(0, name.size() - parts[0].size());
      for (const std::string_view part : {parts[1], parts[2]}) {
        const auto other = schemes.find(parent + std::string(part));
        if (part.empty() || other == schemes.end() || other->second == scheme) continue;
        notes.push_back("vLLM computes `" + name + "` and `" + other->first +
                        "` as one layer, so it needs both on the same grid; transformers does not.");
      }
    }
  }
  return notes;
}

std::vector<Obstacle> compressed_tensors_cautions(const QuantizedCheckpoint& checkpoint) {
  std::vector<Obstacle> found;
  int64_t stacks = 0;
  const std::vector<HfTensor> plan = plan_hf(checkpoint);
  for (const CodedModule& module : coded_modules(checkpoint, plan)) {
    if (!is_expert_stack(*module.planned)) continue;
    ++stacks;
    if (found.empty()) found.push_back({module.planned->key, module.tensor->scheme.weight, ""});
  }
  const std::string model = model_type(checkpoint.config);
  if (found.empty() || model == "qwen2_moe" || model == "qwen3_moe") return {};
  const std::string these = "these " + std::to_string(stacks) + " stacks of experts";
  found.front().reason =
      model.starts_with("gemma4")
          ? "transformers (5.23) has no rule that joins the experts of Gemma 4: it warns and leaves " +
                these +
                " random, unless the program registers the rule (docs/formats/compressed-tensors.md); vLLM "
                "reads them as they are"
          : these + " are written as layers gate_proj, up_proj and down_proj of each expert; whether " +
                "transformers and vLLM have these names for a " + (model.empty() ? "model" : model) +
                " is not known here";
  return found;
}

}  // namespace qat
