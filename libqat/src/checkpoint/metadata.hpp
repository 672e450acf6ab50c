#pragma once

// The part of a checkpoint that its file keeps as text: the header's metadata.

#include <map>
#include <string>
#include <vector>

#include "check.hpp"
#include "qat/io/safetensors.hpp"

namespace qat::checkpoint {

/// What the metadata says of one quantized tensor.
struct TensorEntry {
  Scheme scheme;
  std::vector<int64_t> shape;
};

struct Metadata {
  std::map<std::string, TensorEntry> tensors;
  std::map<std::string, std::string> aliases;
  std::string config;
  std::string tokenizer;
  std::string policy;
};

io::SafetensorsMetadata write_metadata(const QuantizedCheckpoint& checkpoint);

/// Fails through `subject` for anything that `write_metadata` would not have written.
Metadata read_metadata(const Subject& subject, const io::SafetensorsMetadata& metadata);

}  // namespace qat::checkpoint
