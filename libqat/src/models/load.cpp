#include "qat/models/load.hpp"

#include <filesystem>

#include "export/input_file.hpp"
#include "qat/core/error.hpp"
#include "stored_model.hpp"

namespace qat::models {

LoadedModel load_model(const std::string& path) {
  const std::filesystem::path file(path);
  std::error_code ignored;
  if (std::filesystem::is_directory(file, ignored)) {
    const std::string method = quantization_method(file);
    const bool coded = method == "gemma" || method == "compressed-tensors";
    return assemble("load_model", coded ? open_coded_directory(path) : open_directory(path));
  }
  if (file.extension() == ".gguf") return assemble("load_model", open_gguf(path));
  const bool there = std::filesystem::exists(file, ignored);
  throw FileError("load_model: " + path + ": expected a Hugging Face directory or a .gguf file, got " +
                  (there ? "another file" : "nothing there"));
}

}  // namespace qat::models
