#include "export/folder_writer.hpp"

#include <ATen/TensorOperators.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "checkpoint/dtype.hpp"
#include "export/hf_files.hpp"
#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"

namespace qat {
namespace {

constexpr int64_t kShardBytes = 50'000'000'000;  // transformers' save_pretrained

const std::string& free_path(const std::string& path, bool overwrite) {
  require_free(path, overwrite);
  return path;
}

at::Tensor rounded(const QuantizedCheckpoint& checkpoint, const HfTensor& tensor, const HfDtype& dtype) {
  const at::Tensor exact = weight_of(checkpoint, tensor.holder);
  const at::Tensor rounded = exact.to(dtype.tensor).contiguous();
  // An infinity that the rounding made; weights themselves are finite, but a buffer may hold one.
  if (rounded.isinf().sum().item<int64_t>() > exact.isinf().sum().item<int64_t>()) {
    throw NumericError("export_checkpoint: " + tensor.key + ": expected weights within the range of " +
                       std::string(dtype.name) + ", got greater ones");
  }
  return rounded;
}

}  // namespace

FolderTensor float_tensor(const QuantizedCheckpoint& checkpoint, const HfTensor& tensor,
                          const HfDtype& dtype) {
  if (!tensor.weight) {
    return {tensor.key, *checkpoint::file_dtype(tensor.stored), tensor.shape,
            [&checkpoint, holder = tensor.holder] {
              return checkpoint.floats.at(holder).detach().cpu().contiguous();
            },
            tensor.key};
  }
  return {tensor.key, dtype.file, tensor.shape,
          [&checkpoint, &dtype, tensor] { return rounded(checkpoint, tensor, dtype); }, tensor.key};
}

int64_t bytes_of(const FolderTensor& tensor) {
  return c10::multiply_integers(tensor.shape) * io::bit_width(tensor.dtype) / 8;
}

ExportPlan folder_plan(const std::vector<FolderTensor>& tensors, std::vector<Obstacle> obstacles) {
  ExportPlan plan{{}, std::move(obstacles)};
  for (const FolderTensor& tensor : tensors) {
    plan.tensors.push_back(
        {tensor.name, tensor.key, std::string(io::to_string(tensor.dtype)), tensor.shape, bytes_of(tensor)});
  }
  return plan;
}

FolderWriter::FolderWriter(const QuantizedCheckpoint& checkpoint, const std::string& path,
                           const ExportOptions& options)
    : options_(options), folder_(free_path(path, options.overwrite)) {
  const std::string& source = options.tokenizer_from.empty() ? checkpoint.tokenizer : options.tokenizer_from;
  append(copy_tokenizer_files(source, folder_.staging()));
}

void FolderWriter::add(const std::string& name, const std::string& text) {
  io::write_file_atomically(folder_.staging() / name, text);
  files_.push_back(name);
}

void FolderWriter::add_weights(const std::vector<FolderTensor>& tensors,
                               const io::SafetensorsMetadata& metadata) {
  int64_t total = 0, done = 0;
  std::vector<io::SafetensorsEntry> entries;
  for (const FolderTensor& tensor : tensors) {
    const auto produce = [&](const io::ByteSink& sink) {
      const at::Tensor values = tensor.values();
      const auto bytes = static_cast<std::size_t>(values.nbytes());
      sink({static_cast<const std::byte*>(values.const_data_ptr()), bytes});
      done += static_cast<int64_t>(bytes);
      if (options_.progress) options_.progress(done, total);
    };
    entries.push_back({tensor.name, tensor.dtype, tensor.shape, produce});
    total += bytes_of(tensor);
  }
  const int64_t limit = options_.max_shard_bytes == 0 ? kShardBytes : options_.max_shard_bytes;
  append(io::write_safetensors_directory(folder_.staging(), entries, limit, metadata));
}

void FolderWriter::finish(nlohmann::ordered_json manifest) {
  std::sort(files_.begin(), files_.end());
  manifest["files"] = files_;
  io::write_file_atomically(folder_.staging() / kManifest, manifest.dump(2) + "\n");
  if (options_.overwrite) {
    folder_.replace();
  } else {
    folder_.commit();
  }
}

void FolderWriter::append(const std::vector<std::string>& names) {
  files_.insert(files_.end(), names.begin(), names.end());
}

}  // namespace qat
