#pragma once

// What every folder in Hugging Face's layout is made of: the tokenizer's files, config.json, README.md, the
// weights in one file or several, and libqat.json. The folder appears whole or not at all.

#include <ATen/core/Tensor.h>

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "export/hf_plan.hpp"
#include "qat/export/export.hpp"
#include "qat/export/plan.hpp"
#include "qat/io/atomic_folder.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {

/// One tensor of the weights. `values` is called while the file is written and gives the bytes: a contiguous
/// tensor on the CPU of shape's size in `dtype`.
struct FolderTensor {
  std::string name;
  io::Dtype dtype = io::Dtype::kF32;
  std::vector<int64_t> shape;
  std::function<at::Tensor()> values;
  std::string key = {};  ///< of the tensor that it is (part of)
};

int64_t bytes_of(const FolderTensor& tensor);

/// For `plan_export`.
ExportPlan folder_plan(const std::vector<FolderTensor>& tensors, std::vector<Obstacle> obstacles = {});

/// A tensor that is written dequantized: weights in the folder's dtype, integers and bools as they are.
/// Writing it throws NumericError for a weight beyond the dtype's range. Keeps references to `checkpoint` and
/// `dtype`.
FolderTensor float_tensor(const QuantizedCheckpoint& checkpoint, const HfTensor& tensor,
                          const HfDtype& dtype);

class FolderWriter {
 public:
  /// FileError when something stands at `path` (see ExportOptions::overwrite), and the errors of
  /// copy_tokenizer_files.
  FolderWriter(const QuantizedCheckpoint& checkpoint, const std::string& path, const ExportOptions& options);

  void add(const std::string& name, const std::string& text);
  void add_weights(const std::vector<FolderTensor>& tensors, const io::SafetensorsMetadata& metadata);
  /// Writes libqat.json, `manifest` with the names of all files, and lets the folder appear.
  void finish(nlohmann::ordered_json manifest);

 private:
  void append(const std::vector<std::string>& names);

  const ExportOptions& options_;
  io::AtomicFolder folder_;
  std::vector<std::string> files_;
};

}  // namespace qat
