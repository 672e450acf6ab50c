// The target "compressed-tensors": pack-quantized folders, which vLLM and transformers load.
//
// 1. `M.weight_packed` I32 [R, ceil(N * bits / 32)]: code + 2^(bits - 1) as one stream of bits per row, least
//    significant first, in little-endian words.
// 2. `M.weight_scale` [R, N / g], [R, 1] or [1], in the type of the grid's scales.
// 3. `M.weight_shape` I64 [2]: R, N.
// 4. `M.input_scale`, `M.output_scale` F32 [1]: static scales of activations, where they are rounded.
// 5. config.json, `quantization_config`: one group per width, strategy and rounding of activations, with the
//    modules it means.
// A stack of experts is written as a layer per expert and matrix, see expert_stacks.hpp.
// (compressed-tensors 0.20: compressors/pack_quantized, quantization/quant_config.py)

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <nlohmann/json.hpp>

#include "checkpoint/dtype.hpp"
#include "export/activation_scales.hpp"
#include "export/coded_export.hpp"
#include "export/compressed_tensors_config.hpp"
#include "export/compressed_tensors_reader.hpp"
#include "export/expert_stacks.hpp"
#include "export/targets.hpp"
#include "qat/grid/pack.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;

std::string reason_against(const HfTensor& planned, const QuantizedTensor& tensor) {
  if (is_expert_stack(planned) && !has_row_scales(tensor)) {
    return "expected experts with a scale per group within a row, or per row";
  }
  if (!planned.embedding) return "";
  return "expected an unquantized embedding: transformers does not unpack this format's embeddings";
}

std::vector<Obstacle> obstacles(const QuantizedCheckpoint& checkpoint, const ExportOptions& options) {
  return coded_obstacles(fit_integers(checkpoint, "int"), options.dtype, reason_against);
}

/// int8[R, N] -> int32[R, ceil(N * bits / 32)].
at::Tensor packed(const at::Tensor& codes, int bits) {
  const int64_t rows = codes.size(0), width = codes.size(1), words = (width * bits + 31) / 32;
  at::Tensor result = at::zeros({rows, words}, at::kInt);
  auto* bytes = static_cast<uint8_t*>(result.mutable_data_ptr());
  at::parallel_for(0, rows, 1 + 65536 / width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      grid::pack_codes(codes.const_data_ptr<int8_t>() + row * width, width, bits, -(1 << (bits - 1)),
                       bytes + row * words * 4);
    }
  });
  return result;
}

at::ScalarType scale_type(grid::DType stored) {
  return stored == grid::DType::kBF16 ? at::kBFloat16 : stored == grid::DType::kF16 ? at::kHalf : at::kFloat;
}

void add_activations(const QuantizedCheckpoint& checkpoint, const CodedModule& module,
                     std::vector<FolderTensor>& tensors) {
  for (const auto& [part, name] : {std::pair{kInputScale, ".input_scale"}, {kOutputScale, ".output_scale"}}) {
    const float scale = activation_scale(checkpoint, *module.planned, part);
    if (scale == 0.0F) continue;
    tensors.push_back({module.name + name, io::Dtype::kF32, {1}, [scale] {
                         return at::full({1}, scale, at::TensorOptions().dtype(at::kFloat));
                       }});
  }
}

/// A matrix: the tensor of a module, or what it shares with a stack.
void add_layer(const std::string& name, const QuantizedTensor& tensor, std::vector<FolderTensor>& tensors) {
  const auto read = [tensor, name] { return integer_tensor(name, tensor); };
  const grid::Grid& grid = grid::find(tensor.scheme.weight);
  const grid::Info& info = grid.info();
  const int64_t rows = tensor.codes.size(0), width = tensor.codes.size(1);
  const bool whole = info.block == grid::kWholeTensor;
  const at::ScalarType scale = scale_type(info.fields[0].dtype);
  tensors.push_back({name + ".weight_packed",
                     io::Dtype::kI32,
                     {rows, (width * info.bits + 31) / 32},
                     [read, bits = info.bits] { return packed(read().codes, bits); }});
  tensors.push_back({name + ".weight_scale", *checkpoint::file_dtype(scale),
                     whole ? std::vector<int64_t>{1} : std::vector<int64_t>{rows, grid.blocks(width)},
                     [read, scale] { return read().scales.to(scale).contiguous(); }});
  tensors.push_back({name + ".weight_shape", io::Dtype::kI64, {2}, [rows, width] {
                       return at::tensor({rows, width}, at::TensorOptions().dtype(at::kLong));
                     }});
}

void add_module(const CodedModule& module, std::vector<FolderTensor>& tensors) {
  if (!is_expert_stack(*module.planned)) return add_layer(module.name, *module.tensor, tensors);
  for (const ExpertLayer& layer : expert_layers(*module.planned)) {
    add_layer(layer.name, layer_of(*module.tensor, layer), tensors);
  }
}

std::vector<FolderTensor> folder_tensors(const QuantizedCheckpoint& checkpoint,
                                         const std::vector<CodedModule>& modules,
                                         const std::vector<HfTensor>& plan, const HfDtype& dtype) {
  return coded_tensors(checkpoint, modules, plan, dtype,
                       [&checkpoint](const CodedModule& module, std::vector<FolderTensor>& tensors) {
                         add_module(module, tensors);
                         add_activations(checkpoint, module, tensors);
                       });
}

ExportPlan planned(const QuantizedCheckpoint& given, std::string_view dtype) {
  const Fitted fitted = fit_integers(given, "int");
  const std::vector<HfTensor> plan = plan_hf(fitted.checkpoint);
  const std::vector<CodedModule> modules = coded_modules(fitted.checkpoint, plan);
  return folder_plan(folder_tensors(fitted.checkpoint, modules, plan, hf_dtype(dtype)),
                     coded_obstacles(fitted, reason_against));
}

void write(const QuantizedCheckpoint& given, const std::string& path, const ExportOptions& options) {
  const QuantizedCheckpoint checkpoint = fit_integers(given, "int").checkpoint;
  const ConsumerDtype dtype = consumer_dtype(checkpoint, options.dtype);
  const std::vector<HfTensor> plan = plan_hf(checkpoint);
  const std::vector<CodedModule> modules = coded_modules(checkpoint, plan);
  const CodedSummary summary{"compressed-tensors", "Pack-quantized weights (Compressed Tensors)",
                             "vLLM and transformers", compressed_tensors_notes(checkpoint, plan)};
  FolderWriter writer(checkpoint, path, options);
  const std::vector<FolderTensor> tensors = folder_tensors(checkpoint, modules, plan, *dtype.dtype);
  Json config = hf_config(checkpoint, *dtype.dtype);
  config["quantization_config"] = compressed_tensors_config(checkpoint, plan);
  writer.add("config.json", config.dump(2) + "\n");
  writer.add("README.md", coded_readme(options.name, checkpoint, dtype, summary));
  writer.add_weights(tensors, {{"format", "pt"}});
  writer.finish(coded_manifest(checkpoint, plan, dtype, summary));
}

std::vector<Obstacle> cautions(const QuantizedCheckpoint& checkpoint) {
  return compressed_tensors_cautions(fit_integers(checkpoint, "int").checkpoint);
}

QuantizedCheckpoint import_compressed_tensors(const std::string& path) {
  return import_folder(open_compressed_tensors(path));
}

std::vector<Difference> verify_compressed_tensors(const std::string& path,
                                                  const QuantizedCheckpoint& checkpoint) {
  const CodedFolder folder = open_compressed_tensors(path);
  const QuantizedCheckpoint fitted = fit_integers(checkpoint, "int").checkpoint;
  std::vector<Difference> differences = verify_folder(folder, fitted, plan_hf(fitted));
  if (!same_model(folder.config, checkpoint.config)) {
    differences.push_back(
        {"config.json", "metadata", 1, "expected the checkpoint's configuration, got another"});
  }
  return differences;
}

}  // namespace

extern const Target kCompressedTensorsTarget;
constinit const Target kCompressedTensorsTarget{"compressed-tensors",
                                                {.dtype = true, .folder = true},
                                                obstacles,
                                                planned,
                                                write,
                                                is_compressed_tensors,
                                                verify_compressed_tensors,
                                                import_compressed_tensors,
                                                ActivationPlaces::kLayers,
                                                cautions};

}  // namespace qat
