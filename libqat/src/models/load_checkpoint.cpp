#include <memory>
#include <utility>

#include "qat/checkpoint/checkpoint.hpp"
#include "qat/core/error.hpp"
#include "qat/models/load.hpp"
#include "stored_model.hpp"

namespace qat::models {

LoadedModel load_checkpoint(const std::string& path) {
  const auto checkpoint = std::make_shared<const QuantizedCheckpoint>(load(path));
  if (checkpoint->config.empty()) {
    throw FileError("load_checkpoint: " + path + ": expected the model's configuration, got none");
  }
  StoredModel stored{path, checkpoint->config, checkpoint->tokenizer, {}};
  const auto add = [&](const std::string& key, const std::vector<int64_t>& shape) {
    stored.tensors[key] = {shape, [checkpoint, key] { return weight_of(*checkpoint, key); }};
  };
  for (const auto& [key, tensor] : checkpoint->quantized) add(key, tensor.shape);
  for (const auto& [key, tensor] : checkpoint->floats) add(key, tensor.sizes().vec());
  for (const auto& [key, target] : checkpoint->aliases) {
    add(key, std::vector<int64_t>(stored.tensors.at(target).shape));  // `load` has checked the target
  }
  return assemble("load_checkpoint", std::move(stored));
}

}  // namespace qat::models
