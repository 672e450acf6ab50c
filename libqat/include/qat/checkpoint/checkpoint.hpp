#pragma once

// QuantizedCheckpoint: what ships. Codes, scales and Scheme per quantized tensor, float tensors as they are,
// the model's configuration, and where its tokenizer is. No latents, no optimizer, no estimator.
//
// File `*.qat.safetensors`: `<key>.codes` U8 [R, packed_bytes(N)] (grid/pack.hpp), `<key>.<field>` for each
// stored scale field of the grid (F16 or F32, [R, G] or [R, G, count]), float tensors under their own key;
// metadata `libqat.format` ("1"), `libqat.tensors` (JSON: key -> {"weight": grid, "shape": [...]}),
// `libqat.aliases` (JSON: key -> key), `libqat.config`, `libqat.tokenizer`, `libqat.policy`. Keys are
// state_dict keys
// ("model.layers.0.mlp.down_proj.weight"). Same checkpoint, same bytes.

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "qat/core/scheme.hpp"

namespace qat {

/// One tensor on a grid.
struct QuantizedTensor {
  Scheme scheme;
  std::vector<int64_t> shape;  ///< of the weight: [R, ...]
  at::Tensor codes;            ///< int8[R, N], unpacked
  at::Tensor scales;           ///< float32[R, G, P], stored values
};

struct QuantizedCheckpoint {
  std::map<std::string, QuantizedTensor> quantized;  ///< by state_dict key
  std::map<std::string, at::Tensor> floats;          ///< float32, float16 or bfloat16, by state_dict key
  std::map<std::string, std::string> aliases;        ///< tied key -> the key that holds the data
  std::string config;     ///< model configuration as JSON (Hugging Face's spelling), or ""
  std::string tokenizer;  ///< path of a tokenizer.json, an HF directory or a GGUF, or ""
  std::string policy;     ///< the policy as JSON, or ""
};

/// A latent tensor on its way into a checkpoint.
struct NamedTensor {
  std::string name;  ///< state_dict key
  at::Tensor value;
};

/// Puts `latent` (float32[R, ...]) on the scheme's grid. Float grids are not for this function: add them to
/// `floats`.
QuantizedTensor quantize_tensor(const std::string& key, const at::Tensor& latent, const Scheme& scheme);

/// float32 of the tensor's shape: exactly what the consumer of the file computes.
at::Tensor dequantize_tensor(const std::string& key, const QuantizedTensor& tensor);

/// The weight of `key` (following aliases) as float32. ArgumentError when there is none.
at::Tensor weight_of(const QuantizedCheckpoint& checkpoint, const std::string& key);

/// Every weight as float32 by state_dict key, aliases included.
std::vector<NamedTensor> dequantize(const QuantizedCheckpoint& checkpoint);

/// Writes the file by atomic rename. FileError when it cannot; an existing file then stays as it was.
void save(const QuantizedCheckpoint& checkpoint, const std::string& path);

/// Reads and validates: format version, dtypes, shapes, code range, scales finite. FileError naming file and
/// tensor.
QuantizedCheckpoint load(const std::string& path);

}  // namespace qat
