#pragma once

// What a checkpoint looks like as a Hugging Face folder: the writer follows the plan, verify() compares a
// folder with it.

#include <ATen/core/Tensor.h>

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <set>
#include <string>
#include <vector>

#include "export/hf_dtype.hpp"
#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

struct HfTensor {
  std::string key;     ///< its name in the folder
  std::string holder;  ///< the tensor of the checkpoint that it is, the key itself unless tied
  std::vector<int64_t> shape;
  at::ScalarType stored;   ///< of an integer or a bool; undefined for weights
  bool weight = true;      ///< written in the folder's float type
  bool embedding = false;  ///< a table of rows: by the family's table, or by its name in other families
};

/// Every tensor of the folder, by key. A head that is tied to the embedding is left out, as transformers
/// does, when the configuration ties it; every other tied tensor is written again, which every loader
/// understands.
std::vector<HfTensor> plan_hf(const QuantizedCheckpoint& checkpoint);

/// What the folder's tensors leave out: the head when the configuration ties it to an embedding that is
/// there. Key of the head -> key of the embedding.
std::map<std::string, std::string> tied_head(const std::string& config, const std::set<std::string>& keys);

/// config.json for weights of this type: the checkpoint's configuration with `dtype`, with `architectures`
/// where the family is known, and without what it said of another quantization. ArgumentError when the
/// checkpoint has no configuration.
nlohmann::ordered_json hf_config(const QuantizedCheckpoint& checkpoint, const HfDtype& dtype);

/// Whether two configurations describe one model: equal but for the keys that say how it is stored.
bool same_model(const std::string& config, const std::string& other);

}  // namespace qat
