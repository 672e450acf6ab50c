// The target "gemma-mobile": what transformers loads as `quant_method: gemma`.
//
// 1. Linear layer M: `M.weight` U8 [R, ceil(N * bits / 8)] (2 and 4 bits: code + 2^(bits - 1), least
//    significant bits first) or I8 [R, N] (8 bits); `M.weight_scale` F32 [R, 1];
//    `M.input_activation_scale`, `M.output_activation_scale` F32 [], 0 = the activations are not rounded.
//    Attention A: `A.k_cache_scale`, `A.v_cache_scale` F32 [], where keys and values are kept in 8 bits.
// 2. Embedding E: `E.embedding_quantized`, packed alike; `E.embedding_scale` F32 [R, G], a
//    scale for each G-th of the row.
// 3. config.json, `quantization_config`: regular expressions -> bits, and modules that stay as they are.
// The consumer computes code * scale in the model's dtype. (transformers 5.23: integrations/gemma_quant.py)

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "export/activation_scales.hpp"
#include "export/coded_export.hpp"
#include "export/expert_stacks.hpp"
#include "export/gemma_mobile_reader.hpp"
#include "export/module_patterns.hpp"
#include "export/targets.hpp"
#include "qat/core/error.hpp"
#include "qat/grid/pack.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

std::string reason_against(const HfTensor& planned, const QuantizedTensor& tensor) {
  if (is_expert_stack(planned))
    return "expected unquantized experts: the format has no place for packed ones";
  const grid::Info& info = grid::find(tensor.scheme.weight).info();
  if (info.bits != 2 && info.bits != 4 && info.bits != 8) return "expected 2, 4 or 8 bits";
  if (info.block == grid::kWholeRow || planned.embedding) return "";
  return "expected a scale per row";
}

/// A tied head that is quantized is written as a layer of its own, because transformers cannot tie packed
/// tensors.
std::vector<HfTensor> plan_mobile(const QuantizedCheckpoint& checkpoint) {
  std::vector<HfTensor> plan = plan_hf(checkpoint);
  std::set<std::string> keys;
  for (const HfTensor& planned : plan) keys.insert(planned.key);
  for (const auto& [head, embedding] : tied_head(checkpoint.config, keys)) {
    const auto found = std::find_if(plan.begin(), plan.end(),
                                    [&](const HfTensor& planned) { return planned.key == embedding; });
    if (!checkpoint.quantized.contains(found->holder)) continue;
    HfTensor twin = *found;
    twin.key = head;
    twin.embedding = false;
    plan.push_back(twin);
  }
  std::erase_if(plan, [](const HfTensor& planned) { return is_activation_scale(planned.key); });
  return plan;
}

/// Whether the configuration ties the head to an embedding that is packed here.
bool writes_out_a_tie(const std::vector<HfTensor>& plan, const QuantizedCheckpoint& checkpoint) {
  const Json config = Json::parse(checkpoint.config, nullptr, false);
  const bool tied = config.contains("tie_word_embeddings") && config["tie_word_embeddings"] == true;
  return tied && std::any_of(plan.begin(), plan.end(), [&](const HfTensor& planned) {
           return planned.embedding && checkpoint.quantized.contains(planned.holder);
         });
}

/// What unquantized experts cost; nothing where there are none.
std::vector<Obstacle> float_experts(const QuantizedCheckpoint& checkpoint,
                                    const std::vector<HfTensor>& plan) {
  int64_t experts = 0, all = 0, stacks = 0;
  std::vector<Obstacle> found;
  for (const HfTensor& planned : plan) {
    const int64_t weights = c10::multiply_integers(planned.shape);
    all += weights;
    if (!is_expert_stack(planned) || checkpoint.quantized.contains(planned.holder)) continue;
    experts += weights;
    ++stacks;
    if (found.empty()) found.push_back({planned.key, "float", ""});
  }
  if (!found.empty()) {
    found.front().reason = "this format has no place for packed experts: " + std::to_string(stacks) +
                           " stacks of them, " + std::to_string(experts) + " of " + std::to_string(all) +
                           " weights, stay float, 2 bytes each in a bfloat16 model and 4 in a float32 one";
  }
  return found;
}

/// Published checkpoints have a scale for each row and layer of the per-layer table, and no experts.
std::vector<Obstacle> cautions(const QuantizedCheckpoint& checkpoint) {
  const QuantizedCheckpoint fitted = fit_integers(checkpoint, "mobile").checkpoint;
  const std::vector<HfTensor> plan = plan_mobile(fitted);
  std::vector<Obstacle> found = float_experts(fitted, plan);
  for (const CodedModule& module : coded_modules(fitted, plan)) {
    const std::string& grid = module.tensor->scheme.weight;
    if (!module.planned->embedding || grid::find(grid).info().block == grid::kWholeRow) continue;
    found.push_back(
        {module.planned->key, grid,
         "transformers (5.23) decodes several scales per row, but makes room for one when it loads"});
  }
  return found;
}

std::vector<Obstacle> obstacles(const QuantizedCheckpoint& checkpoint, const ExportOptions& options) {
  return coded_obstacles(fit_integers(checkpoint, "mobile"), options.dtype, reason_against);
}

/// int8[R, N] -> uint8[R, packed_bytes(N)], or the codes themselves for 8 bits.
at::Tensor packed(const at::Tensor& codes, int bits) {
  if (bits == 8) return codes;
  const int64_t rows = codes.size(0), width = codes.size(1), bytes = grid::packed_bytes(width, bits);
  at::Tensor result = at::zeros({rows, bytes}, at::kByte);
  at::parallel_for(0, rows, 1 + 65536 / width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      grid::pack_codes(codes.const_data_ptr<int8_t>() + row * width, width, bits, -(1 << (bits - 1)),
                       result.mutable_data_ptr<uint8_t>() + row * bytes);
    }
  });
  return result;
}

FolderTensor number_tensor(const std::string& name, float number) {
  return {name, io::Dtype::kF32, {}, [number] { return at::scalar_tensor(number, at::kFloat); }};
}

void add_module(const QuantizedCheckpoint& checkpoint, const CodedModule& module,
                std::vector<FolderTensor>& tensors) {
  const auto read = [&tensor = *module.tensor, key = module.planned->key] {
    return integer_tensor(key, tensor);
  };
  const int bits = grid::find(module.tensor->scheme.weight).info().bits;
  const int64_t rows = module.tensor->codes.size(0), width = module.tensor->codes.size(1);
  const int64_t groups = grid::find(module.tensor->scheme.weight).blocks(width);
  const bool embedding = module.planned->embedding;
  tensors.push_back({module.name + (embedding ? ".embedding_quantized" : ".weight"),
                     bits == 8 ? io::Dtype::kI8 : io::Dtype::kU8,
                     {rows, grid::packed_bytes(width, bits)},
                     [read, bits] { return packed(read().codes, bits); }});
  tensors.push_back({module.name + (embedding ? ".embedding_scale" : ".weight_scale"),
                     io::Dtype::kF32,
                     {rows, groups},
                     [read] { return read().scales; }});
  if (embedding) return;
  for (const char* part : {kInputScale, kOutputScale}) {
    tensors.push_back(number_tensor(module.name + part, activation_scale(checkpoint, *module.planned, part)));
  }
}

Json anchored(const ModulePattern& pattern) {
  return "^" + (pattern.regex ? pattern.text : escaped(pattern.text)) + "$";
}

Json quantization_config(const QuantizedCheckpoint& checkpoint, const std::vector<HfTensor>& plan) {
  std::map<int, std::vector<std::string>> members;
  bool embeddings = false;
  for (const CodedModule& module : coded_modules(checkpoint, plan)) {
    members[grid::find(module.tensor->scheme.weight).info().bits].push_back(module.name);
    embeddings = embeddings || module.planned->embedding;
  }
  std::vector<std::string> unquantized = float_modules(checkpoint, plan, true);
  for (const auto& [alias, holder] : checkpoint.aliases) {
    if (!checkpoint.quantized.contains(holder)) unquantized.push_back(module_of(alias));
  }
  // A head that the configuration ties to a float embedding is a layer all the same.
  std::set<std::string> keys;
  for (const HfTensor& planned : plan) keys.insert(planned.key);
  for (const auto& [head, embedding] : tied_head(checkpoint.config, keys)) {
    const bool listed =
        std::find(unquantized.begin(), unquantized.end(), module_of(head)) != unquantized.end();
    if (!listed) unquantized.push_back(module_of(head));
  }
  Json modules = Json::object(), kept = Json::array();
  for (const auto& [bits, names] : members) {
    std::vector<std::string> others = unquantized;
    for (const auto& [other, their] : members) {
      if (other != bits) others.insert(others.end(), their.begin(), their.end());
    }
    for (const ModulePattern& pattern : module_patterns(names, others)) {
      modules[anchored(pattern).get<std::string>()] = {{"num_bits", bits}};
    }
  }
  std::vector<std::string> all;
  for (const auto& [bits, names] : members) all.insert(all.end(), names.begin(), names.end());
  for (const ModulePattern& pattern : module_patterns(unquantized, all)) kept.push_back(anchored(pattern));
  return {{"quant_method", "gemma"},
          {"num_bits", 4},
          {"quantize_embeddings", embeddings},
          {"module_quant_configs", modules},
          {"modules_to_not_convert", kept}};
}

std::vector<FolderTensor> folder_tensors(const QuantizedCheckpoint& checkpoint,
                                         const std::vector<CodedModule>& modules,
                                         const std::vector<HfTensor>& plan, const HfDtype& dtype) {
  std::vector<FolderTensor> tensors =
      coded_tensors(checkpoint, modules, plan, dtype,
                    [&checkpoint](const CodedModule& module, std::vector<FolderTensor>& parts) {
                      add_module(checkpoint, module, parts);
                    });
  for (const auto& [key, scale] : planned_scales(checkpoint, plan, /*caches=*/true)) {
    if (!is_cache_scale(key)) continue;
    tensors.push_back(number_tensor(key, scale));
    tensors.back().key = key;
  }
  return tensors;
}

ExportPlan planned(const QuantizedCheckpoint& given, std::string_view dtype) {
  const Fitted fitted = fit_integers(given, "mobile");
  const std::vector<HfTensor> plan = plan_mobile(fitted.checkpoint);
  const std::vector<CodedModule> modules = coded_modules(fitted.checkpoint, plan);
  return folder_plan(folder_tensors(fitted.checkpoint, modules, plan, hf_dtype(dtype)),
                     coded_obstacles(fitted, reason_against));
}

void write(const QuantizedCheckpoint& given, const std::string& path, const ExportOptions& options) {
  const QuantizedCheckpoint checkpoint = fit_integers(given, "mobile").checkpoint;
  const ConsumerDtype dtype = consumer_dtype(checkpoint, options.dtype);
  const std::vector<HfTensor> plan = plan_mobile(checkpoint);
  CodedSummary summary{
      "gemma-mobile", "Packed weights of 2, 4 and 8 bits (`quant_method: gemma`)", "transformers", {}};
  Json config = hf_config(checkpoint, *dtype.dtype);
  if (writes_out_a_tie(plan, checkpoint)) {
    config["tie_word_embeddings"] = false;
    summary.notes.emplace_back(
        "The head is the embedding; it is written twice, because transformers cannot tie packed tensors.");
  }
  FolderWriter writer(checkpoint, path, options);
  const std::vector<CodedModule> modules = coded_modules(checkpoint, plan);
  const std::vector<FolderTensor> tensors = folder_tensors(checkpoint, modules, plan, *dtype.dtype);
  config["quantization_config"] = quantization_config(checkpoint, plan);
  writer.add("config.json", config.dump(2) + "\n");
  writer.add("README.md", coded_readme(options.name, checkpoint, dtype, summary));
  writer.add_weights(tensors, {{"format", "pt"}});
  writer.finish(coded_manifest(checkpoint, plan, dtype, summary));
}

QuantizedCheckpoint import_gemma_mobile(const std::string& path) {
  return import_folder(open_gemma_mobile(path));
}

std::vector<Difference> verify_gemma_mobile(const std::string& path, const QuantizedCheckpoint& checkpoint) {
  const CodedFolder folder = open_gemma_mobile(path);
  const QuantizedCheckpoint fitted = fit_integers(checkpoint, "mobile").checkpoint;
  const std::vector<HfTensor> plan = plan_mobile(fitted);
  std::string expected = fitted.config;
  if (writes_out_a_tie(plan, fitted)) {
    Json config = Json::parse(expected);
    config["tie_word_embeddings"] = false;
    expected = config.dump();
  }
  std::vector<Difference> differences = verify_folder(folder, fitted, plan, /*caches=*/true);
  if (!same_model(folder.config, expected)) {
    differences.push_back(
        {"config.json", "metadata", 1, "expected the checkpoint's configuration, got another"});
  }
  return differences;
}

}  // namespace

extern const Target kGemmaMobileTarget;
constinit const Target kGemmaMobileTarget{"gemma-mobile",
                                          {.dtype = true, .folder = true},
                                          obstacles,
                                          planned,
                                          write,
                                          is_gemma_mobile,
                                          verify_gemma_mobile,
                                          import_gemma_mobile,
                                          ActivationPlaces::kLayersAndCaches,
                                          cautions};

}  // namespace qat
