#pragma once

// What every source of weights is turned into before it becomes a decoder: Hugging Face names, shapes, and a
// way to read the numbers.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "qat/models/load.hpp"

namespace qat::models {

/// One tensor of a file.
struct StoredTensor {
  std::vector<int64_t> shape;
  std::function<at::Tensor()> read;  ///< -> float32 of `shape`
};

struct StoredModel {
  std::string path;                             ///< what the user gave, for messages
  std::string config;                           ///< config.json
  std::string tokenizer;                        ///< as in LoadedModel
  std::map<std::string, StoredTensor> tensors;  ///< by Hugging Face name
};

/// Builds the decoder. Resolves a stored head beside tied embeddings (see `load_model`), checks names and
/// shapes against the decoder's parameters, and only then reads. FileError listing every tensor that does not
/// fit.
LoadedModel assemble(const char* function, StoredModel stored);

/// The config of a model at `path`; errors name the path besides the key.
DecoderConfig config_of_file(const char* function, const std::string& path, const std::string& json);

/// Sources of `load_model`.
StoredModel open_directory(const std::string& path);
/// A folder of codes and scales, dequantized.
StoredModel open_coded_directory(const std::string& path);
StoredModel open_gguf(const std::string& path);

}  // namespace qat::models
