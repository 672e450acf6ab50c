#include <ATen/ops/equal.h>

#include <nlohmann/json.hpp>

#include "export/comparison.hpp"
#include "export/folder_writer.hpp"
#include "export/hf_files.hpp"
#include "export/hf_plan.hpp"
#include "export/targets.hpp"

namespace qat {
namespace {

const HfDtype& chosen_dtype(const QuantizedCheckpoint& checkpoint, const std::string& name) {
  return name.empty() ? exact_hf_dtype(checkpoint) : hf_dtype(name);
}

HfWeights judge(const QuantizedCheckpoint& checkpoint, const std::vector<HfTensor>& plan,
                const HfDtype& dtype) {
  HfWeights weights{&dtype, requantization_report(checkpoint, dtype.name), {}};
  for (const HfTensor& tensor : plan) {
    if (!tensor.weight || checkpoint.quantized.contains(tensor.holder)) continue;
    const at::Tensor exact = weight_of(checkpoint, tensor.holder);
    if (!at::equal(exact.to(dtype.tensor).to(at::kFloat), exact))
      weights.rounded_floats.push_back(tensor.key);
  }
  return weights;
}

std::vector<FolderTensor> folder_tensors(const QuantizedCheckpoint& checkpoint,
                                         const std::vector<HfTensor>& plan, const HfDtype& dtype) {
  std::vector<FolderTensor> tensors;
  for (const HfTensor& tensor : plan) tensors.push_back(float_tensor(checkpoint, tensor, dtype));
  return tensors;
}

ExportPlan planned(const QuantizedCheckpoint& checkpoint, std::string_view dtype) {
  return folder_plan(folder_tensors(checkpoint, plan_hf(checkpoint), hf_dtype(dtype)));
}

void export_hf(const QuantizedCheckpoint& checkpoint, const std::string& path, const ExportOptions& options) {
  const HfDtype& dtype = chosen_dtype(checkpoint, options.dtype);
  const std::vector<HfTensor> plan = plan_hf(checkpoint);
  FolderWriter writer(checkpoint, path, options);
  const HfWeights weights = judge(checkpoint, plan, dtype);
  writer.add("config.json", hf_config(checkpoint, dtype).dump(2) + "\n");
  writer.add("README.md", hf_readme(options.name, weights));
  writer.add_weights(folder_tensors(checkpoint, plan, dtype),
                     {{"format", "pt"}, {"libqat.requantization", requantization_summary(weights)}});
  writer.finish(hf_manifest(weights));
}

/// Any model can be written; what may be asked besides is that its weights survive another quantizer.
std::vector<Obstacle> obstacles(const QuantizedCheckpoint& checkpoint, const ExportOptions& options) {
  std::vector<Obstacle> found;
  if (!options.require_exact) return found;
  const std::string dtype(chosen_dtype(checkpoint, options.dtype).name);
  for (const Requantization& row : requantization_report(checkpoint, dtype)) {
    if (row.exact()) continue;
    found.push_back({row.tensor, row.grid,
                     std::to_string(row.changed_blocks) + " of " + std::to_string(row.blocks) +
                         " blocks do not requantize exactly from " + dtype});
  }
  return found;
}

bool is_folder(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::is_directory(path, ignored);
}

}  // namespace

extern const Target kHfTarget;
constinit const Target kHfTarget{"hf",      {.dtype = true, .folder = true, .require_exact = true},
                                 obstacles, planned,
                                 export_hf, is_folder,
                                 verify_hf, nullptr};

}  // namespace qat
