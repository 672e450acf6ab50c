#include <ATen/ops/equal.h>

#include "checkpoint/dtype.hpp"
#include "export/comparison.hpp"
#include "export/hf_files.hpp"
#include "export/hf_plan.hpp"
#include "export/targets.hpp"
#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"
#include "qat/io/atomic_folder.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {
namespace {

constexpr int64_t kShardBytes = 50'000'000'000;  // transformers' save_pretrained

const HfDtype& chosen_dtype(const QuantizedCheckpoint& checkpoint, const std::string& name) {
  return name.empty() ? exact_hf_dtype(checkpoint) : hf_dtype(name);
}

/// A tensor as the folder holds it, on the CPU.
at::Tensor written(const QuantizedCheckpoint& checkpoint, const HfTensor& tensor, const HfDtype& dtype) {
  if (!tensor.weight) return checkpoint.floats.at(tensor.holder).cpu().contiguous();
  const at::Tensor exact = weight_of(checkpoint, tensor.holder);
  const at::Tensor rounded = exact.to(dtype.tensor).contiguous();
  // An infinity that the rounding made; weights themselves are finite, but a buffer may hold one.
  if (rounded.isinf().sum().item<int64_t>() > exact.isinf().sum().item<int64_t>()) {
    throw NumericError("export_checkpoint: " + tensor.key + ": expected weights within the range of " +
                       std::string(dtype.name) + ", got greater ones");
  }
  return rounded;
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

class FolderWriter {
 public:
  FolderWriter(const QuantizedCheckpoint& checkpoint, const std::filesystem::path& folder)
      : checkpoint_(checkpoint), folder_(folder) {}

  void add(const std::string& name, const std::string& text) {
    io::write_file_atomically(folder_ / name, text);
    files_.push_back(name);
  }

  void add_tokenizer(const std::string& source) { append(copy_tokenizer_files(source, folder_)); }

  void add_weights(const std::vector<HfTensor>& plan, const HfWeights& weights,
                   const ExportOptions& options) {
    const HfDtype& dtype = *weights.dtype;
    int64_t total = 0, done = 0;
    std::vector<io::SafetensorsEntry> entries;
    for (const HfTensor& tensor : plan) {
      const auto produce = [&, this](const io::ByteSink& sink) {
        const at::Tensor values = written(checkpoint_, tensor, dtype);
        const auto bytes = static_cast<std::size_t>(values.nbytes());
        sink({static_cast<const std::byte*>(values.const_data_ptr()), bytes});
        done += static_cast<int64_t>(bytes);
        if (options.progress) options.progress(done, total);
      };
      const io::Dtype file = tensor.weight ? dtype.file : *checkpoint::file_dtype(tensor.stored);
      entries.push_back({tensor.key, file, tensor.shape, produce});
      int64_t count = 1;
      for (const int64_t size : tensor.shape) count *= size;
      total += count * io::bit_width(file) / 8;
    }
    const int64_t limit = options.max_shard_bytes == 0 ? kShardBytes : options.max_shard_bytes;
    append(io::write_safetensors_directory(
        folder_, entries, limit,
        {{"format", "pt"}, {"libqat.requantization", requantization_summary(weights)}}));
  }

  const std::vector<std::string>& files() const noexcept { return files_; }

 private:
  void append(const std::vector<std::string>& names) {
    files_.insert(files_.end(), names.begin(), names.end());
  }

  const QuantizedCheckpoint& checkpoint_;
  std::filesystem::path folder_;
  std::vector<std::string> files_;
};

void export_hf(const QuantizedCheckpoint& checkpoint, const std::string& path, const ExportOptions& options) {
  require_free(path, options.overwrite);
  const HfDtype& dtype = chosen_dtype(checkpoint, options.dtype);
  const std::vector<HfTensor> plan = plan_hf(checkpoint);
  const HfWeights weights = judge(checkpoint, plan, dtype);

  io::AtomicFolder folder(path);
  FolderWriter writer(checkpoint, folder.staging());
  writer.add_tokenizer(options.tokenizer_from.empty() ? checkpoint.tokenizer : options.tokenizer_from);
  writer.add("config.json", hf_config(checkpoint, dtype));
  writer.add("README.md", hf_readme(options.name, weights));
  writer.add_weights(plan, weights, options);
  io::write_file_atomically(folder.staging() / kManifest, hf_manifest(weights, writer.files()));
  if (options.overwrite) {
    folder.replace();
  } else {
    folder.commit();
  }
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
                                 obstacles, export_hf,
                                 is_folder, verify_hf,
                                 nullptr};

}  // namespace qat
