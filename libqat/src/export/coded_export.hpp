#pragma once

// What writers of folders of symmetric integers have in common.

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "export/fitting.hpp"
#include "export/folder_writer.hpp"
#include "export/integer_tensor.hpp"

namespace qat {

/// How many layers of one width a folder has, and what people should know of it.
struct CodedSummary {
  std::string_view target;
  std::string title;      ///< of README.md: "pack-quantized weights of Compressed Tensors"
  std::string consumers;  ///< "vLLM and transformers"
  std::vector<std::string> notes;
};

/// The checkpoint with its tensors as symmetric integers, where that is exactly possible: those of another
/// grid are converted, `family` ("int" or "mobile") first.
Fitted fit_integers(const QuantizedCheckpoint& checkpoint, const std::string& family);

/// Why the format has no place for one quantized tensor; "" when it has.
using Judge = std::function<std::string(const HfTensor& tensor, const QuantizedTensor& quantized)>;

/// Tensors that are no symmetric integers, that are neither matrices nor stacks of experts, or that `judge`
/// refuses; when there are none, those that no dtype of the model reproduces.
std::vector<Obstacle> coded_obstacles(const Fitted& fitted, const std::string& dtype, const Judge& judge);
/// The former alone, for which no numbers are needed.
std::vector<Obstacle> coded_obstacles(const Fitted& fitted, const Judge& judge);

/// The tensors of the plan that are quantized, and the names of their modules; a stack of experts goes by its
/// own name.
struct CodedModule {
  const HfTensor* planned;
  const QuantizedTensor* tensor;
  std::string name;
};
std::vector<CodedModule> coded_modules(const QuantizedCheckpoint& checkpoint,
                                       const std::vector<HfTensor>& plan);

/// The folder's tensors: the parts that `add` appends for each module, then what is not quantized, in
/// `dtype`.
using AddModule = std::function<void(const CodedModule& module, std::vector<FolderTensor>& tensors)>;
std::vector<FolderTensor> coded_tensors(const QuantizedCheckpoint& checkpoint,
                                        const std::vector<CodedModule>& modules,
                                        const std::vector<HfTensor>& plan, const HfDtype& dtype,
                                        const AddModule& add);

/// Modules of the plan with unquantized matrices, embeddings included or not.
std::vector<std::string> float_modules(const QuantizedCheckpoint& checkpoint,
                                       const std::vector<HfTensor>& plan, bool embeddings);

/// README.md of the folder.
std::string coded_readme(const std::string& name, const QuantizedCheckpoint& checkpoint,
                         const ConsumerDtype& dtype, const CodedSummary& summary);

/// libqat.json: the grid and shape of each tensor, and ties that had to be written out.
nlohmann::ordered_json coded_manifest(const QuantizedCheckpoint& checkpoint,
                                      const std::vector<HfTensor>& plan, const ConsumerDtype& dtype,
                                      const CodedSummary& summary);

/// "model.layers.0.mlp.up_proj.weight" -> "model.layers.0.mlp.up_proj"; "" for other names.
std::string module_of(std::string_view key);

}  // namespace qat
