#include <filesystem>
#include <memory>

#include "qat/arch/family.hpp"
#include "qat/core/error.hpp"
#include "qat/io/mapped_file.hpp"
#include "qat/io/safetensors.hpp"
#include "stored_model.hpp"
#include "values.hpp"

namespace qat::models {
namespace {

std::string read_text(const std::filesystem::path& path) {
  const io::MappedFile file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.size()};
}

grid::DType float_type(const std::string& path, const io::SafetensorsTensor& tensor) {
  switch (tensor.dtype) {
    case io::Dtype::kF32:
      return grid::DType::kF32;
    case io::Dtype::kF16:
      return grid::DType::kF16;
    case io::Dtype::kBF16:
      return grid::DType::kBF16;
    default:
      throw UnsupportedError("load_model: " + path + ": " + tensor.name +
                             ": expected F32, F16 or BF16, got " + std::string(io::to_string(tensor.dtype)));
  }
}

}  // namespace

StoredModel open_directory(const std::string& path) {
  const std::filesystem::path folder(path);
  StoredModel stored{path, read_text(folder / "config.json"), path, {}};
  const DecoderConfig config = config_of_file("load_model", (folder / "config.json").string(), stored.config);
  const arch::Family& family = arch::find_by_model_type(config.model_type);
  const auto files = std::make_shared<const io::SafetensorsDirectory>(folder);
  for (const std::string& name : files->names()) {
    if (arch::matches_any(family.hf_only, name)) continue;
    const io::SafetensorsTensor* tensor = files->find(name);
    const grid::DType dtype = float_type(path, *tensor);
    // `files` keeps the map alive for as long as the tensor may be read.
    stored.tensors[name] = {
        tensor->shape, [files, tensor, dtype] { return read_floats(tensor->data, dtype, tensor->shape); }};
  }
  return stored;
}

}  // namespace qat::models
