#pragma once

// Folders in Hugging Face's layout that hold symmetric integers: what reading them back and comparing them
// with a checkpoint have in common. A format contributes how the codes of one module are found.

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "export/activation_scales.hpp"
#include "export/hf_plan.hpp"
#include "export/integer_tensor.hpp"
#include "qat/io/safetensors.hpp"

namespace qat {

struct FolderWeights {
  std::filesystem::path path;
  io::SafetensorsDirectory tensors;
};

/// What is in a folder. Opening it checks the configuration; `coded` checks each tensor when it is read.
struct CodedFolder {
  std::shared_ptr<const FolderWeights> weights;
  std::string config;              ///< as the model's own, without what it says of the quantization
  const HfDtype* dtype = nullptr;  ///< of the model
  std::string family;              ///< of the grids, "int" or "mobile"
  /// State_dict key -> its codes and scales. FileError naming folder and tensor.
  std::map<std::string, std::function<IntegerTensor()>> coded;
  std::vector<std::string> floats;  ///< the other tensors
  ActivationScaleMap scales;        ///< of activations, without zeros
  std::string surplus;  ///< the first tensor of a coded module that this format does not have, or ""
};

/// The folder's config.json and weights, with nothing in `coded` yet. FileError when the dtype is none of the
/// three.
CodedFolder open_folder(const std::filesystem::path& path);

/// Whether the folder holds a tokenizer's files.
bool has_tokenizer(const std::filesystem::path& folder);

/// Throws FileError: "import_checkpoint: <folder>: <where>: expected <expected>, got <got>".
[[noreturn]] void fail_folder(const std::filesystem::path& folder, const std::string& where,
                              const std::string& expected, const std::string& got);

/// A tensor of the folder; FileError unless it is there, has this shape and one of these types.
const io::SafetensorsTensor& expect_tensor(const FolderWeights& weights, const std::string& name,
                                           const std::vector<int64_t>& shape,
                                           const std::vector<io::Dtype>& dtypes);

/// A tensor of any type that torch has, as it is.
at::Tensor read_tensor(const io::SafetensorsTensor& stored);

/// Scales as float32 with the type in which they are stored. FileError for others than F32, F16 and BF16, and
/// for ones that are not finite.
at::Tensor read_scales(const FolderWeights& weights, const io::SafetensorsTensor& stored, grid::DType* type);

/// One number. FileError for another shape or type, and for one that is not finite.
float read_number(const FolderWeights& weights, const std::string& name);

/// The folder as a checkpoint; grids that libqat.json names are taken when they are the same numbers.
QuantizedCheckpoint import_folder(const CodedFolder& folder);

/// Compares every tensor of the plan, quantized ones by codes, scales and the values that the consumer
/// computes; and the activation scales, of keys and values too if `caches`.
std::vector<Difference> verify_folder(const CodedFolder& folder, const QuantizedCheckpoint& checkpoint,
                                      const std::vector<HfTensor>& plan, bool caches = false);

}  // namespace qat
